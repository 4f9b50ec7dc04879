"""A fresh process loads every format: diffusers by its own converters, PEFT by its own loader, and this toolkit."""

import json
from pathlib import Path

import pytest

from tests.adapter_material import make_adapter
from tests.fork_server import fork
from tests.format_loading import check
from tests.test_formats import VARIANTS
from tests.tiny_model import write_tiny_base
from wan_finetune.formats.exporting import export
from wan_finetune.formats.reading import FORMATS

CASES = {
    **{name: [{"expert": "low", **changes}] for name, changes in VARIANTS.items()},
    "plain": [{"expert": "high"}, {"expert": "low", "rank": 2}],
}


@pytest.fixture(scope="module")
def found(tiny_base, tmp_path_factory) -> dict[str, dict]:
    """What one fresh process says of all of them."""
    folder = tmp_path_factory.mktemp("loading")
    write_tiny_base(folder / "single", num_experts=1)
    for case, members in CASES.items():
        for changes in members:
            adapter = make_adapter(**changes)
            place = folder / "files" / case / adapter.expert
            FORMATS["diffusers"].write(place / "adapter.safetensors", adapter)
            for name, file_format in FORMATS.items():
                if not file_format.refusal(adapter):
                    export([adapter], file_format, place / name)
    bases = {"1": folder / "single", "2": tiny_base}
    child = fork(check, bases, folder / "files", folder / "report.json", log=folder / "log")
    assert child.wait(300) == 0, child.output
    return json.loads((folder / "report.json").read_text())


def partial(name: str) -> bool:
    return name.startswith("attention only")


def test_every_format_of_every_variant_was_loaded_by_all_that_read_it(found):
    ways = {(name.split(" ")[-2], name.split(" ")[-1]) for name in found}
    assert ways == {
        ("diffusers", "us"), ("diffusers", "diffusers"), ("comfyui", "us"), ("comfyui", "diffusers"), ("kohya", "us"),
        ("kohya", "diffusers"), ("peft", "us"), ("peft", "peft"), ("original", "us"),
    }  # fmt: skip
    # A DoRA has two formats and four ways, all else has nine.
    assert len(found) == 9 * (len(VARIANTS) - 1 + 1) + 4


def test_every_key_is_matched_the_scale_is_exact_and_the_output_is_the_trained_one(found):
    wrong = {
        name: said
        for name, said in found.items()
        if not (partial(name) and name.endswith("kohya diffusers"))
        and (
            "error" in said
            or not said["matched"]
            or said["scale_error"] > 1e-7  # alpha in fp32
            or said["difference"] > 2e-5
            or said["change"] < 1e-3
        )
    }
    assert not wrong


def test_of_kohyas_format_diffusers_wants_every_linear_which_the_caveat_says(found):
    said = found["attention only low kohya diffusers"]
    assert "KeyError" in said["error"]
    adapter = make_adapter(**VARIANTS["attention only"])
    assert "musubi-tuner and ComfyUI read this file, diffusers does not" in FORMATS["kohya"].caveat(adapter)
    assert FORMATS["kohya"].caveat(make_adapter()) is None
    assert FORMATS["diffusers"].caveat(adapter) is None


def test_what_diffusers_does_with_bare_names_is_why_they_are_not_meant_for_it(tmp_path):
    from diffusers import WanPipeline

    (path,) = export([make_adapter()], FORMATS["original"], tmp_path)
    state: dict = WanPipeline.lora_state_dict(str(path))
    assert all(key.startswith("blocks.") for key in state), "no prefix, so load_lora_weights takes none of it"
    assert Path(path).is_file()
