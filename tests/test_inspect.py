"""`wan-finetune inspect` and `export`: what files are, whoever wrote them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.adapter_material import as_written_by, make_adapter, same_update, update
from wan_finetune.cli import main
from wan_finetune.experts import EXPERTS
from wan_finetune.export import write_adapter_folder
from wan_finetune.formats import FORMAT_NAMES
from wan_finetune.formats.exporting import export
from wan_finetune.formats.reading import FORMATS, read_all, read_file

ABOUT = {"base": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "trigger": "ember style", "toolkit": "wan-finetune 0.1.0"}


def said_of(capsys, *arguments: str) -> dict[str, str]:
    """The facts that `inspect` prints, by their names."""
    assert main(["inspect", *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    return dict(line.strip().split("  ", 1) for line in lines if "  " in line.strip())


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_inspect_says_the_same_of_an_adapter_in_every_format(tmp_path, capsys, name):
    (path,) = export([make_adapter("low", alpha=4.0, about=ABOUT)], FORMATS[name], tmp_path)
    said = said_of(capsys, str(path))
    assert said["format"] == name and said["kind"] == "LoRA"
    assert (said["expert"], said["goes into"], said["rank"], said["alpha"]) == ("low noise", "transformer_2", "4", "4")
    assert said["modules"].startswith("20 (attn1.to_k, ") or said["modules"].startswith("20 (attn1.to_q, ")
    assert said["made by"] == said["toolkit"] == "wan-finetune 0.1.0" and said["trigger"] == "ember style"
    assert "note" not in said


def test_layers_are_a_table_of_each_updates_norm(tmp_path, capsys):
    adapter = make_adapter(targets=("attn1.to_q", "ffn.net.2"), blocks=3)
    (path,) = export([adapter], FORMATS["comfyui"], tmp_path)
    assert main(["inspect", str(path), "--layers"]) == 0
    table = capsys.readouterr().out.split("\nblock  ", 1)[1].splitlines()
    assert table[0].split() == ["attn1.to_q", "ffn.net.2"] and [row.split()[0] for row in table[1:]] == ["0", "1", "2"]
    for block, row in enumerate(table[1:]):
        for cell, target in zip(row.split()[1:], ("attn1.to_q", "ffn.net.2"), strict=True):
            assert float(cell) == pytest.approx(float(update(adapter, f"blocks.{block}.{target}").norm()), rel=5e-3)


def test_a_module_without_lora_is_a_dash_in_the_table(tmp_path, capsys):
    adapter = make_adapter(targets=("attn1.to_q",), ranks={"blocks.1.ffn.net.2": 4})
    (path,) = export([adapter], FORMATS["comfyui"], tmp_path)
    assert main(["inspect", str(path), "--layers"]) == 0
    rows = capsys.readouterr().out.split("\nblock  ", 1)[1].splitlines()
    assert rows[1].split()[2] == "-" and rows[2].split()[2] != "-"


def test_json_is_for_programs_and_has_the_layers_when_asked(tmp_path, capsys):
    pair = [make_adapter("high", about=ABOUT), make_adapter("low", rslora=True)]
    export(pair, FORMATS["diffusers"], tmp_path)
    assert main(["inspect", str(tmp_path), "--json", "--layers"]) == 0
    high, low = json.loads(capsys.readouterr().out)["adapters"]
    assert (high["expert"], high["alpha"], high["facts"], high["sane"]) == ("high", 7.0, ABOUT, True)
    assert (low["kind"], low["component"], len(low["layers"])) == ("rsLoRA", "transformer_2", 20)
    module = "blocks.1.ffn.net.2"
    assert low["layers"][module] == pytest.approx(float(update(pair[1], module).norm()), rel=1e-6)


def test_a_folder_with_one_bad_file_shows_the_good_one_and_ends_with_2(tmp_path, capsys):
    export([make_adapter("high"), make_adapter("low")], FORMATS["diffusers"], tmp_path)
    (tmp_path / "low_noise.safetensors").write_bytes(b"short")
    assert main(["inspect", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "high noise" in captured.out and "low_noise.safetensors: not a safetensors file" in captured.err
    assert main(["inspect", str(tmp_path), "--json"]) == 2
    assert [each["sane"] for each in json.loads(capsys.readouterr().out)["adapters"]] == [True, False]


@pytest.mark.parametrize(
    ("tool", "metadata", "made_by", "shown"),
    [
        ("ai-toolkit", {"software": '{"name": "ai-toolkit", "repo": "r", "version": "0.5"}', "ss_output_name": "look"},
         "ai-toolkit 0.5 (metadata: software)", ("ss_output_name", "look")),
        ("musubi-tuner", {"ss_network_module": "networks.lora_wan", "ss_network_dim": "4", "modelspec.title": "Look"},
         "a kohya-style trainer such as musubi-tuner (metadata: ss_*)", ("modelspec.title", "Look")),
        ("finetrainers", {"lora_config": '{"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}'},
         "finetrainers (metadata: lora_config)", None),
        ("DiffSynth-Studio", {}, "not said", None),
    ],
)  # fmt: skip
def test_inspect_says_who_made_a_file_with_what(tmp_path, capsys, tool, metadata, made_by, shown):
    save_file(as_written_by(tool, make_adapter("low", alpha=4.0)), tmp_path / "a.safetensors", metadata or None)
    said = said_of(capsys, str(tmp_path / "a.safetensors"), "--expert", "low")
    assert said["made by"] == made_by
    assert shown is None or said[shown[0]] == shown[1]
    assert ("note" in said) == (tool != "finetrainers")


def test_an_alpha_that_the_file_does_not_say_is_told_of_and_can_be_said(tmp_path, capsys):
    save_file(as_written_by("VideoX-Fun, PEFT", make_adapter("low", alpha=4.0)), tmp_path / "a.safetensors")
    file = str(tmp_path / "a.safetensors")
    said = said_of(capsys, file, "--expert", "low")
    assert said["alpha"] == "4" and said["note"] == "alpha not in the file: taken as rank"
    said = said_of(capsys, file, "--expert", "low", "--alpha", "2")
    assert said["alpha"] == "2" and "note" not in said
    for alpha in ("0", "-1", "nan", "inf"):
        assert main(["inspect", file, "--expert", "low", f"--alpha={alpha}"]) == 2
        assert "must be a number above 0" in capsys.readouterr().err


def test_export_takes_another_tools_file_with_what_it_leaves_out(tmp_path, capsys):
    adapter = make_adapter("low", alpha=2.0)
    save_file(as_written_by("VideoX-Fun, PEFT", adapter), tmp_path / "a.safetensors")
    arguments = ["export", str(tmp_path / "a.safetensors"), "--format", "diffusers", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and "does not say of which expert it is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--expert", "low"]) == 0
    assert "note: low: alpha not in the file: taken as rank" in capsys.readouterr().out
    arguments[-1] = str(tmp_path / "again")
    assert main([*arguments, "--expert", "low", "--alpha", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'again' / 'low_noise.safetensors'}\n"
    assert same_update(adapter, read_file(tmp_path / "again" / "low_noise.safetensors"))


def test_of_a_folder_the_expert_that_is_named_is_shown_and_taken(tmp_path, capsys):
    export([make_adapter("high"), make_adapter("low")], FORMATS["diffusers"], tmp_path / "pair")
    assert main(["inspect", str(tmp_path / "pair"), "--expert", "low"]) == 0
    said = capsys.readouterr().out
    assert "low noise" in said and "high noise" not in said
    assert main(["inspect", str(tmp_path / "pair"), "--expert", "single"]) == 2
    assert "pair: has no adapter of the only expert" in capsys.readouterr().err
    taking = ["--format", "comfyui", "--expert", "low", "--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "pair"), *taking]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["low_noise.safetensors"]


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_export_leads_from_every_format_to_every_other(tmp_path, name):
    pair = [make_adapter("high"), make_adapter("low")]
    export(pair, FORMATS[name], tmp_path / "in")
    for target in FORMAT_NAMES:
        out = tmp_path / target
        assert main(["export", str(tmp_path / "in"), "--format", target, "--out", str(out)]) == 0
        assert all(same_update(a, b) for a, b in zip(pair, read_all(out), strict=True))
        assert {str(p.relative_to(out)) for p in out.rglob("*.safetensors")} == {
            FORMATS[target].file_name(EXPERTS[expert]) for expert in ("high", "low")
        }


def test_export_says_who_cannot_read_a_partial_kohya_file_and_refuses_a_dora(tmp_path, capsys):
    export([make_adapter("high", ("attn1.to_q",))], FORMATS["diffusers"], tmp_path / "some")
    assert main(["export", str(tmp_path / "some"), "--format", "kohya", "--out", str(tmp_path / "out")]) == 0
    assert "note: high: musubi-tuner and ComfyUI read this file, diffusers does not" in capsys.readouterr().out
    export([make_adapter("high", dora=True)], FORMATS["diffusers"], tmp_path / "dora")
    for name in ("kohya", "comfyui", "original"):
        assert main(["export", str(tmp_path / "dora"), "--format", name, "--out", str(tmp_path / name)]) == 2
        assert "is not written: a DoRA" in capsys.readouterr().err and not (tmp_path / name).exists()


def test_a_source_that_is_nowhere_is_told_of(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source in ("empty", "absent.safetensors"):
        assert main(["inspect", str(tmp_path / source)]) == 2
        assert source in capsys.readouterr().err
    assert main(["export", str(tmp_path / "absent"), "--format", "peft", "--out", str(tmp_path / "out")]) == 2
    assert "neither a path here nor a repository" in capsys.readouterr().err


def test_a_runs_folder_and_a_file_for_both_experts_show_all_that_they_hold(tmp_path, capsys):
    pair = [make_adapter("high"), make_adapter("low")]
    write_adapter_folder(tmp_path / "run" / "adapter", pair)
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapters"]
    assert [(each["format"], each["expert"]) for each in found] == [
        ("diffusers", "high"), ("diffusers", "low"), ("comfyui", "high"), ("comfyui", "low"),
    ]  # fmt: skip
    both = {}
    for mark, adapter in zip(("transformer_1", "transformer_2"), pair, strict=True):
        theirs = as_written_by("ai-toolkit", adapter)
        both |= {name.replace("diffusion_model", f"diffusion_model.{mark}"): value for name, value in theirs.items()}
    save_file(both, tmp_path / "both.safetensors")
    assert main(["inspect", str(tmp_path / "both.safetensors"), "--json"]) == 0
    assert [each["expert"] for each in json.loads(capsys.readouterr().out)["adapters"]] == ["high", "low"]


def test_pefts_folder_of_one_adapter_is_taken_as_it_is(tmp_path, capsys):
    (path,) = export([make_adapter("high")], FORMATS["peft"], tmp_path)
    assert said_of(capsys, str(path.parent))["expert"] == "high noise"
    assert torch.equal(
        *(each.weights["blocks.0.attn1.to_q.lora_A.weight"] for each in (read_file(path), make_adapter()))
    )
    assert Path(path).parent.name == "high_noise"
