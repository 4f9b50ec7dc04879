"""The command line and the README, word for word."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.test_adapters import trained
from wan_finetune.cli import main
from wan_finetune.experts import HIGH, LOW, base_folder
from wan_finetune.export import verify_adapter_folder, write_adapter_folder
from wan_finetune.formats import comfyui
from wan_finetune.formats.reading import read_file
from wan_finetune.video import read_video

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def adapter_folder(tiny_base, tmp_path) -> Path:
    write_adapter_folder(tmp_path / "adapter", [trained(tiny_base, expert) for expert in (HIGH, LOW)])
    return tmp_path / "adapter"


def test_sample_writes_clips_and_how_they_were_made(tiny_base, adapter_folder, tmp_path, capsys):
    common = ["sample", "--base", str(tiny_base), "--size", "64x32", "--frames", "5", "--steps", "2", "--seed", "7"]
    prompts = ["--prompt", "A red circle.", "--prompt", "穿汉服的女孩在樱花树下起舞"]
    assert main([*common, *prompts, "--adapter", str(adapter_folder), "--out", str(tmp_path / "with")]) == 0
    assert main([*common, *prompts, "--out", str(tmp_path / "without")]) == 0
    manifest = json.loads((tmp_path / "with" / "manifest.json").read_text())
    assert [(clip["prompt"], clip["seed"]) for clip in manifest["clips"]] == [
        ("A red circle.", 7),
        ("穿汉服的女孩在樱花树下起舞", 7),
    ]
    assert manifest["sampling"]["shift"] == 5.0 and manifest["versions"]["diffusers"]
    assert str(tmp_path) not in json.dumps(manifest)
    for clip in manifest["clips"]:
        frames, fps = read_video(tmp_path / "with" / clip["file"])
        assert frames.shape == (5, 32, 64, 3) and fps == pytest.approx(16)
        assert (frames != read_video(tmp_path / "without" / clip["file"])[0]).any()
    first = (tmp_path / "with" / manifest["clips"][0]["file"]).read_bytes()
    assert main([*common, *prompts, "--adapter", str(adapter_folder), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / manifest["clips"][0]["file"]).read_bytes() == first
    assert "2/2 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "64x30"], "height: Input should be a multiple of 16, got '30'"),
        (["--frames", "6"], "num_frames: Value error, num_frames must be 4n+1"),
        (["--adapter", "nowhere"], "adapter 'nowhere' is neither a path here nor a repository"),
        (["--guidance", "1", "2", "3"], "--guidance takes one number, or two"),
    ],
)
def test_bad_arguments_end_with_one_message_and_exit_2(tiny_base, tmp_path, capsys, arguments, message):
    common = ["sample", "--base", str(tiny_base), "--prompt", "x", "--out", str(tmp_path / "out")]
    assert main([*common, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_a_file_is(adapter_folder, capsys):
    for file, kind in ((adapter_folder / "low_noise.safetensors", "diffusers"), (adapter_folder / "comfyui" / "low_noise.safetensors", "comfyui")):  # fmt: skip # noqa: E501
        assert main(["inspect", str(file)]) == 0
        said = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
        assert (said["format"], said["expert"], said["rank"], said["alpha"]) == (kind, "low noise", "4", "7")
        assert said["modules"].startswith("20 (") and said["kind"] == "LoRA"


def test_inspect_takes_another_tools_file_and_tells_the_kinds_of_lora_apart(tiny_base, tmp_path, capsys):
    plain = trained(tiny_base, LOW)
    rslora = replace(plain, rslora=True, targets=tuple(plain.modules))
    write_adapter_folder(tmp_path, [rslora], with_comfyui=False)
    assert main(["inspect", str(tmp_path / LOW.file_name)]) == 0
    said = capsys.readouterr().out
    assert "kind  rsLoRA" in said and "..." in said
    save_file({f"transformer.{name}": value for name, value in plain.weights.items()}, tmp_path / "other.safetensors")
    assert main(["inspect", str(tmp_path / "other.safetensors")]) == 2
    assert "does not say of which expert it is" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "other.safetensors"), "--expert", "low"]) == 0
    assert "low noise" in capsys.readouterr().out


def test_export_writes_the_same_adapter_in_another_format(adapter_folder, tmp_path):
    assert main(["export", str(adapter_folder), "--format", "comfyui", "--out", str(tmp_path / "c")]) == 0
    for expert in (HIGH, LOW):
        written = comfyui.read(tmp_path / "c" / expert.file_name, expert.name)
        assert (written.alpha, written.rank) == (7.0, 4)
        assert (tmp_path / "c" / expert.file_name).read_bytes() == (
            adapter_folder / "comfyui" / expert.file_name
        ).read_bytes()


def test_pair_joins_two_runs_into_one_folder(tiny_base, tmp_path, capsys):
    high = replace(trained(tiny_base, HIGH), about={"base": "tiny", "trigger": "ember", "sampling_shift": "5.0"})
    low = replace(trained(tiny_base, LOW, rank=8), about={"base": "tiny", "trigger": "ember", "sampling_shift": "7.0"})
    write_adapter_folder(tmp_path / "first" / "adapter", [high])
    write_adapter_folder(tmp_path / "second", [low])
    low_file = tmp_path / "second" / "comfyui" / LOW.file_name
    assert main(["pair", str(tmp_path / "first"), str(low_file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "the high-noise expert: rank 4, alpha 7, 20 modules; base tiny, trigger ember, steps not said" in said
    assert "the low-noise expert: rank 8" in said and f"; from {low_file}\n" in said
    assert "warning: they were previewed with sampling_shift 5.0 and 7.0" in said
    for adapter in (high, low):
        name = {"high": HIGH, "low": LOW}[adapter.expert].file_name
        for file in (tmp_path / "out" / name, tmp_path / "out" / "comfyui" / name):
            back = read_file(file)
            assert back.about == adapter.about and back.expert == adapter.expert
            assert all(torch.equal(back.weights[key], value) for key, value in adapter.weights.items())
    verify_adapter_folder(str(tiny_base), tmp_path / "out", [high, low])
    assert main(["pair", str(tmp_path / "first"), str(low_file), "--out", str(tmp_path / "out")]) == 2
    assert "already holds high_noise.safetensors; give another folder" in capsys.readouterr().err


def test_pair_refuses_what_is_no_pair(tiny_base, tmp_path, capsys):
    about = {"base": "tiny", "trigger": "ember"}
    adapters = {expert.name: replace(trained(tiny_base, expert), about=about) for expert in (HIGH, LOW)}
    small = {name: value[:, :12] if ".lora_A." in name else value for name, value in adapters["low"].weights.items()}
    write_adapter_folder(tmp_path / "pair", list(adapters.values()))
    write_adapter_folder(tmp_path / "base", [replace(adapters["low"], about={**about, "base": "other"})])
    write_adapter_folder(tmp_path / "trigger", [replace(adapters["low"], about={**about, "trigger": ""})])
    write_adapter_folder(tmp_path / "size", [replace(adapters["low"], weights=small, about={})])
    high = tmp_path / "pair" / HIGH.file_name
    cases = {
        high: "is the adapter of the high-noise expert, not of the low-noise expert",
        tmp_path / "base": "no pair: their base is 'tiny' and 'other'",
        tmp_path / "trigger": "no pair: their trigger is 'ember' and ''",
        tmp_path / "size": "no pair: blocks.0.attn1.to_k has another size",
        tmp_path / "absent": "no such adapter file or folder",
    }
    for low, message in cases.items():
        assert main(["pair", str(high), str(low), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["pair", str(tmp_path / "pair"), str(tmp_path / "pair"), "--out", str(tmp_path / "out")]) == 0


@pytest.fixture
def as_after_the_main_job(tmp_path, monkeypatch) -> Path:
    """A folder that looks as a checkout does after `./launch.sh`, with untrained adapters."""
    (tmp_path / "wan_finetune" / "pocket").mkdir(parents=True)
    (tmp_path / "wan_finetune" / "pocket" / "model").symlink_to(base_folder("pocket"))
    adapters = [trained(base_folder("pocket"), expert) for expert in (HIGH, LOW)]
    write_adapter_folder(tmp_path / "runs" / "pocket" / "adapter", adapters)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_python_runs(as_after_the_main_job):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    assert names["clip"].shape == (9, 64, 64, 3)
    mine = names["pipe"]
    exec(blocks[1], names)
    plain = names["pipe"]
    latents, t, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([900.0]), torch.randn(1, 9, 64)
    for name in ("transformer", "transformer_2"):
        with torch.inference_mode():
            outputs = [getattr(pipe, name)(latents, t, text, return_dict=False)[0] for pipe in (mine, plain)]
        assert torch.allclose(*outputs, atol=1e-4)


def test_the_readmes_sample_command_runs(as_after_the_main_job):
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "wan-finetune sample" in b)
    words = shlex.split(block.replace("\\\n", " "))
    assert words[0] == ".venv/bin/wan-finetune"
    assert main(words[1:]) == 0
    assert (as_after_the_main_job / "samples" / "manifest.json").is_file()


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"(?:configs|docs)/[\w./-]+\.\w+|CONTRIBUTING\.md|LICENSE", README):
        assert (ROOT / name).is_file(), name
