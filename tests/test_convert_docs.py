"""docs/convert.md: each command and the Python run, on small checkpoints of the kinds that they name."""

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.original_checkpoints import write_a14b
from tests.test_convert_comfyui import scaled_old, wide_denoiser, write_models_folder
from wan_finetune.cli import main

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "convert.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE, re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with everything that the page names."""
    import torch

    monkeypatch.chdir(tmp_path)
    write_a14b(tmp_path / "Wan2.2-T2V-A14B")
    write_models_folder(tmp_path / "ComfyUI" / "models")
    for name, seed in (("first", 1), ("second", 2)):
        save_file(wide_denoiser(seed), tmp_path / f"{name}.safetensors")
    stored, _ = scaled_old(torch.float8_e4m3fn)(wide_denoiser(1))
    save_file(stored, tmp_path / "wan2.1_t2v_14B_fp8_scaled.safetensors")
    return tmp_path


def test_every_command_of_the_page_makes_a_folder_and_the_python_opens_it(place, capsys):
    original, comfyui, single = COMMANDS
    for command in (original, comfyui.replace("base/A14B", "base/comfyui"), single):
        program, *arguments = shlex.split(command)
        assert program == "wan-finetune" and main(arguments) == 0
    assert {folder.name for folder in (place / "base").iterdir()} == {"A14B", "comfyui", "wan21"}
    capsys.readouterr()
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "docs/convert.md", "exec"), {})
    assert capsys.readouterr().out == "12.0\n"


def test_every_option_of_the_page_is_one_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert known - {"--help", "--verify"} == set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--base"}
