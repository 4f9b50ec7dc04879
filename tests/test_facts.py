"""Files say what they are, by an allow-list: nothing of the machine, its user or its paths is in any byte."""

import getpass
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.adapter_material import make_adapter
from train.engine import make_accelerator
from train.job import make_adapter as adapter_of_run
from train.preparing import prepare_data
from train.provenance import configuration_hash, facts_of_run
from train.state import ExpertState
from wan_finetune.export import write_adapter_folder
from wan_finetune.facts import FACTS, NEVER, kept, listed, modelspec
from wan_finetune.formats import FORMAT_NAMES
from wan_finetune.formats.exporting import export
from wan_finetune.formats.reading import FORMATS, read_all, read_file

A14B = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
WHOLE = {
    "base": A14B, "base_revision": "0123abc", "trigger": "余烬 ember style", "steps": "1500", "training_shift": "5.0",
    "sampling_shift": "12.0", "boundary": "0.875", "resolution": "832x480", "frames": "81", "fps": "16.0",
    "dataset": "0123456789abcdef", "configuration": "fedcba9876543210", "licence": "Apache-2.0",
    "toolkit": "wan-finetune 0.1.0", "operation": "merge of 2 adapters: 0.5, 0.5",
}  # fmt: skip


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def bytes_of(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_every_fact_on_the_list_is_kept_as_it_is():
    assert WHOLE.keys() == FACTS.keys() and kept(WHOLE) == WHOLE


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_file_says_what_it_is_to_this_toolkit_and_to_others(tmp_path, name):
    adapter = make_adapter("high", about=WHOLE, alphas={"blocks.0.attn1.to_q": 3.5})
    (path,) = export([adapter], FORMATS[name], tmp_path)
    assert read_file(path).about == WHOLE
    metadata = metadata_of(path)
    about = json.loads(metadata["wan_finetune"])
    assert {key: about[key] for key in ("expert", "component", "rank")} == {
        "expert": "high", "component": "transformer", "rank": "4",
    }  # fmt: skip
    assert about["alpha"] == ("4" if name == "original" else "3.5, 7")
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert {"sai_model_spec", "architecture", "implementation", "title"} <= spec.keys(), "ModelSpec's MUST"
    assert spec["sai_model_spec"] == "1.0.0" and spec["architecture"] == "wan2.2-t2v-a14b/lora"
    assert spec["implementation"] in ("diffusers", "https://github.com/Wan-Video/Wan2.2")
    assert spec["trigger_phrase"] == "余烬 ember style" and spec["license"] == "Apache-2.0"
    assert spec["resolution"] == "832x480" and spec["timestep_range"] == "875,1000"
    assert "the high-noise expert" in spec["title"] and not any("date" in key for key in metadata)


def test_modelspec_tells_the_experts_and_kinds_of_base_apart():
    high, low = (modelspec(make_adapter(expert, about=WHOLE), "diffusers") for expert in ("high", "low"))
    assert low["modelspec.timestep_range"] == "0,875" and low["modelspec.title"] != high["modelspec.title"]
    single = modelspec(make_adapter("single"), "diffusers")
    assert single["modelspec.architecture"] == "wan2.1/lora" and "modelspec.timestep_range" not in single
    assert "modelspec.trigger_phrase" not in single


LEAKS = {
    "/home/someone/clips": ("base", "trigger", "dataset", "toolkit"), "C:\\Users\\someone": ("trigger", "base"),
    "~/models": ("base", "trigger"), "../models": ("base", "trigger"), "a/b/c": ("base",),
    "hf_abcdefghijklmnopqrstuvwxyz": tuple(FACTS), "https://host.internal/x": ("base", "trigger", "operation"),
    "two\nlines": tuple(FACTS), "nan": ("fps", "boundary"), "x" * 1000: tuple(FACTS),
}  # fmt: skip


@pytest.mark.parametrize("value", LEAKS, ids=lambda value: value[:12])
def test_what_looks_like_a_path_a_token_or_an_address_is_not_written(value):
    assert kept(dict.fromkeys(LEAKS[value], value)) == {}


@settings(max_examples=200)
@given(about=st.dictionaries(st.one_of(st.sampled_from(list(FACTS)), st.text()), st.text()))
def test_nothing_is_kept_that_is_not_on_the_list(about):
    found = kept(about)
    assert found.keys() <= FACTS.keys() and not any(NEVER.search(value) for value in found.values())
    assert found.items() <= about.items()


def test_numbers_are_as_short_as_they_are_exact():
    assert listed([4, 4.0, 0.1, 1 / 3]) == f"4, 4, 0.1, {1 / 3!r}"


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_what_a_stranger_put_into_a_file_is_not_handed_on(tmp_path, name):
    adapter = make_adapter("low")
    tensors, metadata = FORMATS["diffusers"].encode(adapter)
    about = {**json.loads(metadata["wan_finetune"]), "base": "/home/sentinel/base", "machine": "sentinel-host"}
    strange = {"path": "/home/sentinel", "ss_training_comment": "sentinel", "wan_finetune": json.dumps(about)}
    save_file(tensors, tmp_path / "low_noise.safetensors", {**metadata, **strange})
    export(read_all(tmp_path), FORMATS[name], tmp_path / "out")
    assert b"sentinel" in bytes_of(tmp_path) and b"sentinel" not in bytes_of(tmp_path / "out")


def test_a_fact_that_is_left_out_is_told_of(tmp_path, capsys):
    write_adapter_folder(
        tmp_path, [make_adapter("high", about={"trigger": "/home/someone", "base": A14B, "host": "h"})]
    )
    said = capsys.readouterr().out
    assert "high_noise.safetensors does not say host, trigger: not a fact that files may hold" in said
    assert "someone" not in said
    write_adapter_folder(tmp_path, [make_adapter("high", about=WHOLE)])
    assert "does not say" not in capsys.readouterr().out


def test_a_runs_files_have_no_path_token_user_or_host_in_any_byte(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sentinelsentinelsentinelsentinel")
    config = make_config("run.name='sentinel-run'", "data.trigger='ember style'", "hub.license=cc-by-4.0")
    base = Path(config.model.base)
    data = prepare_data(config, make_accelerator(config))
    facts = facts_of_run(config, base, data)
    adapter = adapter_of_run(config, "high", ExpertState(step=3, weights=dict(make_adapter(rank=config.lora.rank).weights)), facts)  # fmt: skip # noqa: E501
    assert adapter.about == kept(adapter.about), "a fact that is dropped on writing"
    assert {"boundary", "resolution", "frames", "dataset", "configuration", "base", "trigger", "steps"} <= adapter.about.keys()  # fmt: skip # noqa: E501
    assert (adapter.about["boundary"], adapter.about["steps"], adapter.about["trigger"]) == (
        "0.875",
        "3",
        "ember style",
    )
    assert adapter.about["resolution"] == "64x64" and adapter.about["frames"] == "9"
    assert adapter.about["licence"] == "cc-by-4.0"
    for name in FORMAT_NAMES:
        export([adapter], FORMATS[name], tmp_path / "out" / name)
    written = bytes_of(tmp_path / "out")
    assert b"ember style" in written
    secrets = [
        str(base.parent), str(tmp_path), str(config.run.folder), str(Path(__file__).parents[1]), "sentinel",
        socket.gethostname(), str(Path.home()), *[str(source.path) for source in config.data.sources],
    ]  # fmt: skip
    # A short name may be in random bytes by chance: as JSON has it.
    names = [f'"{getpass.getuser()}"', f"/{getpass.getuser()}/"]
    assert not [secret for secret in (*secrets, *names) if secret.encode() in written]


def test_the_hash_of_the_configuration_is_of_what_shapes_an_experts_adapter(make_config, tmp_path):
    def of(*overrides: str, expert="high") -> str:
        return configuration_hash(make_config(*overrides), expert)

    plain = of()
    same = ("run.name='other'", "train.order='sequence'", "low.steps=9", f"data.cache='{tmp_path}'", "sampling.steps=3")
    assert {of(change) for change in same} == {plain}
    other = ("high.steps=9", "run.seed=5", "lora.rank=2", "high.flow.shift=2.0", "high.learning_rate=0.5")
    assert len({plain, of(expert="low"), *(of(change) for change in other)}) == 2 + len(other)


def test_a_base_from_the_hub_is_named_with_its_commit(make_config):
    from train.provenance import revision_of

    config = make_config()
    assert revision_of(config, Path("models--a--b") / "snapshots" / "0123abc") == "0123abc"
    named = config.model_copy(update={"model": config.model.model_copy(update={"revision": "v1"})})
    assert revision_of(named, Path("folder")) == "v1" and revision_of(config, Path("folder")) is None
    assert kept({"base_revision": "0123abc"}) and replace(make_adapter(), about={}).about == {}
