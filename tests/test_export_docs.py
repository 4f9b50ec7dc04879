"""docs/export.md: its examples run in their order, and its tables are what the formats do."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from tests.adapter_material import as_written_by, make_adapter, same_update
from wan_finetune.adapters import Adapter, LoraSettings, inject_lora, lora_weights
from wan_finetune.cli import main
from wan_finetune.experts import HIGH, LOW, base_folder, load_expert
from wan_finetune.facts import DERIVED, FACTS
from wan_finetune.formats import FORMAT_NAMES
from wan_finetune.formats.reading import FORMATS, read_all

DOC = Path(__file__).resolve().parent.parent / "docs" / "export.md"
PAGE = DOC.read_text(encoding="utf-8")


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table under a heading, its head first."""
    lines = PAGE.split(f"## {heading}\n", 1)[1].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.fixture
def after_a_run(tmp_path, monkeypatch) -> dict[str, Adapter]:
    """A folder as after the main job, and another trainer's file; the adapters by expert."""
    (tmp_path / "wan_finetune" / "pocket").mkdir(parents=True)
    (tmp_path / "wan_finetune" / "pocket" / "model").symlink_to(base_folder("pocket"))
    adapters = {}
    for expert in (HIGH, LOW):
        model = load_expert(base_folder("pocket"), expert, torch.float32)
        settings = LoraSettings(rank=4, alpha=7.0)
        inject_lora(model, settings, expert.name, seed=0)
        weights = {name: value + 0.1 for name, value in lora_weights(model).items()}
        adapters[expert.name] = Adapter(
            expert=expert.name, rank=4, alpha=7.0, targets=settings.targets, weights=weights, about={}
        )
        FORMATS["diffusers"].write(tmp_path / "runs" / "pocket" / "adapter" / expert.file_name, adapters[expert.name])
    save_file(as_written_by("VideoX-Fun, PEFT", make_adapter("low", alpha=32.0)), tmp_path / "theirs.safetensors")
    monkeypatch.chdir(tmp_path)
    return adapters


def test_every_example_runs_in_its_order(after_a_run, capsys):
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "python", "python", "bash", "bash"]
    names: dict = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            assert words[0] == "wan-finetune" and main(words[1:]) == 0, line
    back = {each.expert: each for each in read_all(Path("adapter-back"))}
    assert all(same_update(adapter, back[expert]) for expert, adapter in after_a_run.items())
    (theirs,) = read_all(Path("adapter-theirs"))
    assert same_update(make_adapter("low", alpha=32.0), theirs)
    latents, t, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([900.0]), torch.randn(1, 9, 64)
    pairs = (names["pipe"].transformer, names["high"]), (names["pipe"].transformer_2, names["low"])
    plain = WanTransformer3DModel.from_pretrained("wan_finetune/pocket/model", subfolder="transformer")
    with torch.inference_mode():
        bare = plain(latents, t, text, return_dict=False)[0]
        for in_diffusers, in_peft in pairs:
            outputs = [model.eval()(latents, t, text, return_dict=False)[0] for model in (in_diffusers, in_peft)]
            assert torch.allclose(*outputs, atol=1e-4) and not torch.allclose(outputs[0], bare, atol=1e-3)


def test_the_table_of_features_is_what_the_formats_refuse():
    rows = {row[0]: dict(zip(FORMAT_NAMES, row[1:], strict=True)) for row in table_after("What each format can say")}
    assert table_after("What each format can say")[0][1:] == list(FORMAT_NAMES)
    kinds = {
        "rsLoRA": make_adapter(rslora=True), "DoRA": make_adapter(dora=True),
        "rank patterns": make_adapter(ranks={"blocks.0.attn1.to_q": 2}),
        "some Linears or blocks only": make_adapter(targets=("attn1.to_q",)),
        "one expert, one denoiser": make_adapter("single"),
    }  # fmt: skip
    for kind, adapter in kinds.items():
        for name, said in rows[kind].items():
            assert (FORMATS[name].refusal(adapter) is not None) == (said == "refused"), (kind, name)
            assert ("diffusers does not read it" in said) == (FORMATS[name].caveat(adapter) is not None), (kind, name)


def test_the_table_of_facts_is_the_allow_list():
    named = {name for row in table_after("What our files say")[1:] for name in re.findall(r"`(\w+)`", row[0])}
    assert named == FACTS.keys() | set(DERIVED)


def test_programs_and_formats_of_the_first_table_are_all_of_them():
    assert {row[1].strip("`") for row in table_after("Which file for which program")[1:]} == set(FORMAT_NAMES)
