"""The model card: its code runs as it stands, its metadata is understood, and it says nothing that it should not."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.fork_server import fork
from tests.publishable import A14B, PROMPTS, SECRET_PLACE, code_of, run_code, write_run
from tests.tiny_model import write_tiny_base
from wan_finetune.card import make_card
from wan_finetune.card_texts import TEXTS
from wan_finetune.errors import InputError
from wan_finetune.experts import SINGLE, base_folder
from wan_finetune.export import write_adapter_folder
from wan_finetune.hub_files import Artefacts, Clip, is_ours, read_artefacts, repository_files, require_no_leak


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "ember", tiny_base)


@pytest.fixture(scope="module")
def artefacts(run) -> Artefacts:
    return read_artefacts(run)


def frames_of(card: str, folder: Path, base: str, adapter: str, out: Path) -> dict[str, np.ndarray]:
    """What the card's code, our pipeline and the base alone give, as a child has made it."""
    child = fork(run_code, code_of(card), folder, base, adapter, out, log=out / "log")
    assert child.wait() == 0, child.output
    found = {name: np.load(out / f"{name}.npy") for name in ("card", "toolkit", "base")}
    found["card"] = np.round(found["card"] * 255.0).astype(np.uint8)
    assert (folder / "clip.mp4").stat().st_size > 500
    return found


def require_the_adapters_output(found: dict[str, np.ndarray]) -> None:
    """The code gives what our own pipeline gives with every expert's adapter in, and another thing than the base."""
    gap = np.abs(found["card"].astype(int) - found["toolkit"])
    changed = np.abs(found["card"].astype(int) - found["base"])
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01
    assert (changed > 1).mean() > 0.1


def test_the_english_cards_code_loads_both_experts_from_a_repository(run, artefacts, tiny_base, tmp_path):
    """In a folder where the names of both repositories lead to folders, the code runs without a change."""
    (tmp_path / "Wan-AI").mkdir()
    (tmp_path / A14B).symlink_to(tiny_base)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "look").symlink_to(run / "adapter")
    card = make_card(artefacts, repo="acme/look")
    found = frames_of(card, tmp_path, str(tiny_base), str(run / "adapter"), tmp_path)
    require_the_adapters_output(found)
    assert json.loads((tmp_path / "strengths.json").read_text()) == pytest.approx(
        {"transformer": 0.5 * 7 / 4, "transformer_2": 0.5 * 7 / 4}
    )


def test_the_chinese_cards_code_runs_beside_the_files_on_the_pocket_model(tmp_path):
    base = base_folder("pocket")
    run = write_run(tmp_path / "ember", base, named="pocket")
    card = make_card(read_artefacts(run), language="zh")
    assert "base_model" not in card
    found = frames_of(card, run / "adapter", "pocket", str(run / "adapter"), tmp_path)
    require_the_adapters_output(found)


def test_a_single_denoisers_card_loads_its_one_file(tmp_path):
    write_tiny_base(tmp_path / "one", num_experts=1)
    run = write_run(tmp_path / "ember", tmp_path / "one", named="one", experts=[SINGLE])
    (run / "adapter" / "one").symlink_to(tmp_path / "one")
    card = make_card(read_artefacts(run))
    assert "transformer_2" not in card and "guidance_scale_2" not in card
    found = frames_of(card, run / "adapter", str(tmp_path / "one"), str(run / "adapter"), tmp_path)
    require_the_adapters_output(found)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("kept", "other"), [("high", "low"), ("low", "high")])
def test_a_card_of_one_expert_speaks_of_its_one_file(run, tmp_path, kept, other, language):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    for folder in ("", "comfyui"):
        (tmp_path / "adapter" / folder / f"{other}_noise.safetensors").unlink()
    card = make_card(read_artefacts(tmp_path / "adapter"), repo="acme/look", language=language)
    assert f"{kept}_noise" in card and f"{other}_noise" not in card and "$" not in card
    assert TEXTS[language].experts[kept] in card and TEXTS[language].experts[other] not in card
    assert code_of(card).count("load_lora_weights") == 1
    assert ("load_into_transformer_2=True" in code_of(card)) == (kept == "low")


def test_metadata_is_what_the_hub_understands(artefacts):
    data = ModelCard(make_card(artefacts, repo="acme/look")).data
    assert data.base_model == A14B and data.base_model_relation == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-video", "apache-2.0")
    assert data.instance_prompt == "ember style" and {"lora", "text-to-video"} <= set(data.tags)
    assert [each["text"] for each in data.widget] == list(PROMPTS)
    files = repository_files(artefacts, "")
    assert all(each["output"]["url"] in files for each in data.widget)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_card_shows_base_beside_adapter_and_says_how_it_was_made(artefacts, language):
    card = make_card(artefacts, repo="acme/look", language=language)
    for clip in artefacts.clips:
        row = next(line for line in card.splitlines() if f"samples/{clip.adapter.name}" in line and "<video" in line)
        assert row.index(f"samples/{clip.base.name}") < row.index(f"samples/{clip.adapter.name}")
    assert "64x64x5, 16 fps, UniPC, 2 steps, shift 3, guidance 3 / 2" in card
    for told in ("rank 4, alpha 7", "0.0001", "adamw", "832x480x33", "| 8 |", "1.25 | 0.5", "90% | 80%", "0.5 | 0.4"):
        assert told in card, told
    assert card.count("\n## ") == 8 and "$" not in card and "t >= 875" in card
    assert bool(re.search("[\u4e00-\u9fff]", card.replace(PROMPTS[1], ""))) == (language == "zh")


def test_a_card_of_an_adapter_folder_alone_has_the_usual_settings_and_no_empty_parts(run):
    card = make_card(read_artefacts(run / "adapter"), language="zh")
    assert "width=832" in card and "flow_shift=3.0" in card and "num_inference_steps=40" in card
    assert '"ember style, 夜里' in card
    assert "widget" not in card and "<video" not in card and "NaN" not in card and "None" not in card
    assert card.count("\n## ") == 6


HOSTILE = 'ember style, a "cat" | `x`\n```\n---\n<script>alert(1)</script> $HOME \\ 猫: #1'


def test_whatever_is_in_a_prompt_or_a_trigger_the_card_keeps_its_shape(artefacts):
    clip = replace(artefacts.clips[0], prompt=HOSTILE)
    about = {**artefacts.adapters[0].about, "trigger": 'a "b" `c`: {d}\n$e'}
    hostile = replace(artefacts, clips=[clip], adapters=[replace(each, about=about) for each in artefacts.adapters])
    card = make_card(hostile, repo="acme/look")
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front["widget"][0]["text"] == HOSTILE and front["instance_prompt"] == about["trigger"]
    strings = [node.value for node in ast.walk(ast.parse(code_of(card))) if isinstance(node, ast.Constant)]
    assert HOSTILE in strings
    body = re.sub(r"^```python\n.*?^```$", "", card.split("\n---\n", 1)[1], flags=re.S | re.M)
    assert "<script" not in body and "```" not in body
    row = next(line for line in body.splitlines() if "<video" in line)
    assert row.count("|") == 4


def test_only_what_is_listed_goes_and_nothing_of_this_machine_is_in_it(run, artefacts, tmp_path):
    files = repository_files(artefacts, make_card(artefacts, repo="acme/look"))
    experts = ["high_noise.safetensors", "low_noise.safetensors"]
    clips = [f"samples/{number:02d}-3-{kind}.mp4" for number in (0, 1) for kind in ("adapter", "base")]
    assert sorted(files) == sorted(
        ["README.md", "evaluation.json", *experts, *(f"comfyui/{e}" for e in experts), *clips]
    )
    assert all(is_ours(name) for name in files if name != "README.md")
    assert not any(
        map(is_ours, ["README.md", "notes.txt", "samples/mine.mp4", "config.json", "comfyui/mine.safetensors"])
    )
    whole = b"".join(each if isinstance(each, bytes) else each.read_bytes() for each in files.values())
    for secret in (SECRET_PLACE, "sentinel-user", str(run), str(Path.home()) + "/"):
        assert secret.encode() not in whole, secret
    require_no_leak(files)
    figures = json.loads(files["evaluation.json"])
    assert figures["look_reduction"] == 0.6 and "judge" not in figures and "clips" not in figures


@pytest.mark.parametrize(
    "leak", [SECRET_PLACE, r"C:\Users\somebody\clips", "hf_token0123", str(Path.cwd() / "x"), "render-07.studio"]
)
def test_a_text_with_a_path_a_hosts_name_or_the_token_in_it_is_not_pushed(artefacts, leak, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "render-07.studio")
    files = repository_files(artefacts, "card")
    with pytest.raises(InputError, match=r"README\.md: holds .*nothing was pushed"):
        require_no_leak({**files, "README.md": f"trained on {leak}".encode()}, "hf_token0123")


def test_a_container_that_works_in_its_root_may_push(artefacts, monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/")
    require_no_leak(repository_files(artefacts, make_card(artefacts, repo="acme/look")))


def test_faulty_folders_are_told_before_anything_goes(run, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_artefacts(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no adapter to push"):
        read_artefacts(tmp_path)
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "low_noise.safetensors").write_bytes((run / "adapter" / "high_noise.safetensors").read_bytes())
    with pytest.raises(InputError, match="are the two swapped"):
        read_artefacts(swapped)
    (swapped / "low_noise.safetensors").write_bytes((run / "adapter" / "low_noise.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"low_noise\.safetensors"):
        read_artefacts(swapped)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples/final/adapter/manifest.json", '{"clips": [{"file": "00-3-adapter.mp4"}]}'),
        ("samples/final/adapter/manifest.json", '{"sampling": {"width": 7}}'),
        ("evaluation.json", "[]"),
        ("validation.jsonl", '{"expert": "high", "step": 2'),
        ("validation.jsonl", '{"expert": "high", "step": 200}'),
        ("config.toml", "[run\n"),
    ],
)
def test_a_runs_file_that_is_damaged_is_named(run, tmp_path, name, content):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'run' / name}: is n")):
        read_artefacts(tmp_path / "run")


def test_the_held_out_loss_is_that_of_the_step_which_the_adapter_is_of(run, tmp_path):
    """With `validation.export = "best"` the adapter is of an earlier step than the last validation."""
    shutil.copytree(run, tmp_path / "run")
    best = [replace(each, about={**each.about, "steps": "100"}) for each in read_artefacts(run).adapters]
    write_adapter_folder(tmp_path / "run" / "adapter", best)
    assert read_artefacts(run).held_out == {"high": (0.5, 0.4), "low": (0.5, 0.4)}
    assert read_artefacts(tmp_path / "run").held_out == {"high": (0.5, 0.42), "low": (0.5, 0.42)}


def test_an_adapter_that_does_not_name_its_base_needs_it_said(artefacts):
    silent = replace(artefacts, adapters=[replace(each, about={}) for each in artefacts.adapters])
    with pytest.raises(InputError, match="say it with --base"):
        make_card(silent)
    assert f"base_model: {A14B}" in make_card(silent, base=A14B)


def test_the_licence_is_what_the_files_say_unless_another_is_named(artefacts):
    said = [replace(each, about={**each.about, "licence": "CC-BY-4.0"}) for each in artefacts.adapters]
    card = make_card(replace(artefacts, adapters=said))
    assert ModelCard(card).data.license == "cc-by-4.0" and "The adapter: cc-by-4.0." in card
    assert ModelCard(make_card(replace(artefacts, adapters=said), license="mit")).data.license == "mit"


def test_clips_are_linked_where_they_are(artefacts):
    places = {clip.adapter: f"../samples/final/adapter/{clip.adapter.name}" for clip in artefacts.clips}
    card = make_card(artefacts, clips=places)
    assert "url: ../samples/final/adapter/00-3-adapter.mp4" in card
    assert isinstance(artefacts.clips[0], Clip)
