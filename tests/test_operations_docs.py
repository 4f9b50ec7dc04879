"""docs/operations.md: every example runs, and what it says of the methods and files is so."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests.lora_material import deltas, make_adapter, write_pair
from wan_finetune.cli import main
from wan_finetune.formats.merged import write_merged
from wan_finetune.formats.reading import read_expert
from wan_finetune.operations.dense import EXACT_SIDE, POWER_ITERATIONS
from wan_finetune.operations.methods import METHODS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
COMMANDS = [line for line in LINES if "--format merged" not in line]


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory) -> Path:
    """A folder with the adapters and models of the examples."""
    folder = tmp_path_factory.mktemp("operations")
    for seed, name in enumerate(("ember", "frost")):
        write_pair(folder / name, seed, about={"base": "wan", "trigger": f"{name} style", "sampling_shift": "5.0"})
    (folder / "wan-base").symlink_to(tiny_base)
    write_merged(tiny_base, [make_adapter(name, 5) for name in ("high", "low")], folder / "tuned", dtype=torch.float32)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_and_makes_an_adapter_of_both_experts(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = shlex.split(command)
    assert words[0] == "wan-finetune" and main(words[1:]) == 0
    out = Path(words[words.index("--out") + 1])
    for expert in ("high", "low"):
        assert deltas(read_expert(out, expert)).any() and read_expert(out / "comfyui", expert).modules
    said = capsys.readouterr().out
    assert f"{out}/high_noise.safetensors\n" in said
    assert "the high-noise expert: " in said and "the low-noise expert: " in said


def test_the_page_has_an_example_of_every_command():
    assert {shlex.split(command)[1] for command in COMMANDS} == {"merge", "extract", "resize", "scale"}


def test_the_merged_model_opens_as_a_pipeline(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (line,) = set(LINES) - set(COMMANDS)
    assert main(shlex.split(line)[1:]) == 0
    assert "ember-wan" in capsys.readouterr().out
    WanPipeline.from_pretrained(place / "ember-wan")


def test_the_table_has_every_method_and_the_numbers_are_those_of_the_code():
    cells = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(METHODS)
    assert f"{EXACT_SIDE:,}" in PAGE and POWER_ITERATIONS == 6 and "six power iterations" in " ".join(PAGE.split())
