"""Full weights with an adapter merged in, against PEFT's own fusing."""

import argparse
import ctypes
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fork_server import fork
from tests.lora_material import make_adapter
from tests.process_facts import resident_bytes
from tests.tiny_model import write_tiny_base
from wan_finetune.adapters import Adapter
from wan_finetune.commands.merged import add_merged_options, export_merged
from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS, HIGH, LOW, SINGLE, load_expert
from wan_finetune.export import probe_output
from wan_finetune.formats import merged, merged_denoiser
from wan_finetune.formats.files import save_atomically
from wan_finetune.formats.merged import write_merged
from wan_finetune.pipeline import add_adapters, load_pipeline

SHARD_BYTES = 24_000
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def sharded(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with its denoisers in several files, as large bases are, and a path in its configurations."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(tiny_base, folder)
    for expert in (HIGH, LOW):
        model = load_expert(tiny_base, expert, torch.float32)
        shutil.rmtree(folder / expert.component)
        model.save_pretrained(folder / expert.component, max_shard_size=SHARD_BYTES)
        assert len(list((folder / expert.component).glob("*.safetensors"))) > 3
    for part, key in {
        "transformer": "_name_or_path",
        "text_encoder": "_name_or_path",
        "tokenizer": "name_or_path",
    }.items():
        config = next((folder / part).glob("*config.json"))
        config.write_text(json.dumps({**json.loads(config.read_text()), key: "/home/someone/base"}))
    (folder / "LICENSE.txt").write_text("Apache-2.0")
    return folder


def pair(seed: int = 1, **fields) -> list[Adapter]:
    about = {"base": "tiny", "trigger": "ember", "sampling_shift": "7.5"}
    return [make_adapter(name, seed, about=about, **fields) for name in ("high", "low")]


def weights_of(folder: Path, component: str) -> dict[str, torch.Tensor]:
    files = sorted((folder / component).glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def fused_by_peft(base: Path, adapters: list[Adapter], strengths: tuple[float, float]) -> dict[str, dict]:
    """PEFT's fusing in plain diffusers: component -> weights."""
    pipe = WanPipeline.from_pretrained(base)
    add_adapters(pipe, adapters, strengths)
    found = {}
    for adapter in adapters:
        model = getattr(pipe, EXPERTS[adapter.expert].component)
        model.fuse_lora(safe_fusing=True)
        model.unload_lora()
        found[EXPERTS[adapter.expert].component] = model.state_dict()
    return found


KINDS = pytest.mark.parametrize(
    "fields",
    [{"ranks": {"blocks.0.ffn.net.2": 6}}, {"rslora": True}, {"dora": True}, {"targets": ("attn2.to_v",)}],
    ids=["ranks", "rslora", "dora", "partial"],
)


@KINDS
def test_merged_weights_are_those_that_peft_fuses_and_bf16_is_their_rounding(sharded, tmp_path, fields):
    adapters = pair(**fields)
    write_merged(sharded, adapters, tmp_path / "fp32", dtype=torch.float32, strengths=(0.8, 0.6))
    write_merged(sharded, adapters, tmp_path / "bf16", strengths=(0.8, 0.6))
    for component, wanted in fused_by_peft(sharded, adapters, (0.8, 0.6)).items():
        base = weights_of(sharded, component)
        found, rounded = weights_of(tmp_path / "fp32", component), weights_of(tmp_path / "bf16", component)
        assert found.keys() == rounded.keys() == wanted.keys() == base.keys()
        changed = {name for name, value in found.items() if not torch.equal(value, base[name])}
        adapter = next(a for a in adapters if EXPERTS[a.expert].component == component)
        assert changed == {f"{module}.weight" for module in adapter.modules}
        for name, value in found.items():
            assert torch.allclose(value, wanted[name], rtol=1e-5, atol=1e-6), name
            kept = any(f"{part}." in f"{name}." for part in WanTransformer3DModel._keep_in_fp32_modules)
            assert torch.equal(rounded[name], value if kept else value.to(BF16)), name


def test_the_folder_opens_in_diffusers_and_draws_what_base_and_adapter_draw(sharded, tmp_path):
    adapters = pair()
    lines = write_merged(sharded, adapters, tmp_path / "out", dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    live = load_pipeline(str(sharded), device="cpu")
    add_adapters(live, adapters)
    for expert in (HIGH, LOW):
        outputs = [probe_output(getattr(p, expert.component), sharded, make_adapter(expert.name)) for p in (pipe, live)]
        assert torch.allclose(*outputs, atol=1e-5)
    assert not any("was trained for" in line for line in lines)
    assert pipe.scheduler.config.flow_shift == 7.5 and any("flow shift is 7.5" in line for line in lines)
    assert WanPipeline.from_pretrained(sharded).scheduler.config.flow_shift == 5.0, "the base's file is not touched"


def test_opened_in_bf16_it_is_the_base_opened_in_bf16_but_for_the_adapter(sharded, tmp_path):
    write_merged(sharded, [], tmp_path / "out")
    for expert in (HIGH, LOW):
        base, found = (load_expert(folder, expert, BF16).state_dict() for folder in (sharded, tmp_path / "out"))
        assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in base.items())


def test_shards_and_index_are_the_bases_and_the_rest_is_linked_without_paths(sharded, tmp_path):
    write_merged(sharded, pair(), tmp_path / "out", name="tiny")
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files - {Path("merged.json")} == {p.relative_to(sharded) for p in sharded.rglob("*") if p.is_file()}
    for expert in (HIGH, LOW):
        index = json.loads(next((tmp_path / "out" / expert.component).glob("*.index.json")).read_text())
        found = weights_of(tmp_path / "out", expert.component)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / expert.component / file, framework="pt") as shard:
                assert name in shard.keys()  # noqa: SIM118 - not a dict
    for path in (tmp_path / "out").rglob("*.json"):
        assert "name_or_path" not in path.read_text() and "someone" not in path.read_text()
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / vae).samefile(sharded / vae)
    assert json.loads((tmp_path / "out" / "merged.json").read_text()) == {
        "base": "tiny",
        "dtype": "bfloat16",
        "adapters": [
            {"expert": name, "strength": 1.0, "trigger": "ember", "sampling_shift": "7.5"} for name in ("high", "low")
        ],
    }


def test_what_was_interrupted_goes_on_with_the_shards_that_were_ready(sharded, tmp_path, monkeypatch):
    write_merged(sharded, pair(), tmp_path / "whole")
    written: list[Path] = []

    def save(path: Path, *arguments, limit: int = 5) -> None:
        if len(written) == limit:
            raise KeyboardInterrupt
        save_atomically(path, *arguments)
        written.append(path)

    monkeypatch.setattr(merged_denoiser, "save_atomically", save)
    with pytest.raises(KeyboardInterrupt):
        write_merged(sharded, pair(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ready = {path: path.stat().st_mtime_ns for path in written}
    (written[-1].parent / ".killed.safetensors.7.partial").write_text("half a shard")
    monkeypatch.setattr(merged_denoiser, "save_atomically", lambda *a: save(*a, limit=-1))
    # There is room for what is left, and not for all of it.
    room = (
        merged.SPARE_BYTES + sum(v.nbytes for e in (HIGH, LOW) for v in weights_of(sharded, e.component).values()) // 2
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=room))
    with pytest.raises(InputError, match="are free; give a folder on another disk"):
        write_merged(sharded, pair(2), tmp_path / "other")
    with pytest.raises(InputError, match="are free; give a folder on another disk"):
        write_merged(sharded, pair(), tmp_path / "out", link=False)
    write_merged(sharded, pair(), tmp_path / "out")
    assert len(written) == len(set(written)), "no shard was written twice"
    assert all((tmp_path / "out" / p.parent.name / p.name).stat().st_mtime_ns == t for p, t in ready.items())
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "out" / "job.json").exists()
    for expert in (HIGH, LOW):
        found, wanted = (weights_of(tmp_path / name, expert.component) for name in ("out", "whole"))
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_disk_that_fills_up_ends_with_a_message_and_the_same_command_goes_on(sharded, tmp_path, monkeypatch):
    def full(file: Path, target: Path, *, link: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merged, "put", full)
        with pytest.raises(InputError, match=r"No space left on device.*the same command goes on"):
            write_merged(sharded, pair(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_merged(sharded, pair(), tmp_path / "out")
    WanPipeline.from_pretrained(tmp_path / "out")


def test_what_another_merge_left_behind_is_not_mixed_in(sharded, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merged, "copy_rest", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_merged(sharded, pair(1), tmp_path / "out")
    for changes in ({"adapters": pair(2)}, {"strengths": (1.0, 0.5)}, {"dtype": torch.float32}):
        write_merged(sharded, **{"adapters": pair(1), "out": tmp_path / "out", **changes})
        write_merged(sharded, **{"adapters": pair(1), "out": tmp_path / "clean", **changes})
        for expert in (HIGH, LOW):
            found, wanted = (weights_of(tmp_path / name, expert.component) for name in ("out", "clean"))
            assert all(torch.equal(value, found[name]) for name, value in wanted.items())
        shutil.rmtree(tmp_path / "clean")
        shutil.rmtree(tmp_path / "out")
    foreign = tmp_path / ".out.partial"
    foreign.mkdir()
    with pytest.raises(InputError, match="is no folder of an interrupted merge"):
        write_merged(sharded, pair(), tmp_path / "out")


def with_config(base: Path, folder: Path, **changes) -> Path:
    shutil.copytree(base, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return folder


def with_weights(base: Path, folder: Path, change) -> Path:
    shutil.copytree(base, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


NAME = "blocks.0.attn1.to_q.weight"


def test_a_base_that_is_quantised_damaged_or_of_another_size_is_refused(tiny_base, tmp_path):
    cases = {
        r"is quantised \(torchao, says config.json\)": with_config(
            tiny_base, tmp_path / "config", quantization_config={"quant_method": "torchao"}
        ),
        "attn1.to_q.weight is F8_E4M3: the weights are quantised": with_weights(
            tiny_base, tmp_path / "fp8", lambda w: {**w, NAME: w[NAME].to(torch.float8_e4m3fn)}
        ),
        "attn1.to_q.weight is I8: the weights are quantised": with_weights(
            tiny_base, tmp_path / "int8", lambda w: {**w, NAME: w[NAME].to(torch.int8)}
        ),
        r"is of another size of base: blocks.0.attn1.to_q is \(24, 24\), the base has \(24, 12\)": with_weights(
            tiny_base, tmp_path / "narrow", lambda w: {**w, NAME: w[NAME][:, :12].contiguous()}
        ),
        "does not fit this base, which has no blocks.0.attn1.to_q": with_weights(
            tiny_base, tmp_path / "lacking", lambda w: {k: v for k, v in w.items() if k != NAME}
        ),
        "is not finite in torch.bfloat16": with_weights(
            tiny_base, tmp_path / "nan", lambda w: {**w, NAME: w[NAME] * float("nan")}
        ),
    }
    for message, base in cases.items():
        with pytest.raises(InputError, match=message):
            write_merged(base, pair(), tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_value_too_large_for_fp16_is_refused(tiny_base, tmp_path):
    base = with_weights(tiny_base, tmp_path / "large", lambda w: {**w, NAME: w[NAME] + 70_000})
    with pytest.raises(InputError, match=r"not finite in torch\.float16; use another --dtype"):
        write_merged(base, pair(), tmp_path / "out", dtype=torch.float16)
    write_merged(base, pair(), tmp_path / "out")


def test_a_folder_in_use_or_a_disk_too_small_is_refused(sharded, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already; give another folder"):
        write_merged(sharded, pair(), tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1 << 20))
    with pytest.raises(InputError, match=r"needs 0.1 GiB and 0.0 GiB are free"):
        write_merged(sharded, pair(), tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


def test_a_base_with_one_denoiser_takes_its_own_adapter_alone(tmp_path):
    write_tiny_base(tmp_path / "base", num_experts=1)
    with pytest.raises(InputError, match="high-noise expert does not fit this base, which has one denoiser"):
        write_merged(tmp_path / "base", pair(), tmp_path / "out")
    adapter = make_adapter("single", 1)
    write_merged(tmp_path / "base", [adapter], tmp_path / "out", dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    wanted = fused_by_peft(tmp_path / "base", [adapter], (1.0, 1.0))[SINGLE.component]
    assert all(torch.allclose(v, wanted[n], rtol=1e-5, atol=1e-6) for n, v in pipe.transformer.state_dict().items())


def test_the_options_of_export_say_all_of_it(sharded, tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    add_merged_options(parser)
    words = ["--out", str(tmp_path / "out"), "--strength", "0.8", "0.6", "--dtype", "fp32", "--copy"]
    adapters = pair()
    lines = export_merged(parser.parse_args([*words, "--base", str(sharded)]), adapters)
    assert lines[0] == str(tmp_path / "out")
    assert "warning: the adapter of the low-noise expert was trained for tiny, and this is base" in lines
    wanted = fused_by_peft(sharded, adapters, (0.8, 0.6))
    for expert in (HIGH, LOW):
        found = weights_of(tmp_path / "out", expert.component)
        assert all(torch.allclose(value, wanted[expert.component][n], rtol=1e-5) for n, value in found.items())
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert not (tmp_path / "out" / vae).samefile(sharded / vae)
    with pytest.raises(InputError, match="needs --base"):
        export_merged(parser.parse_args(words), adapters)
    with pytest.raises(InputError, match="a strength of nan is no number"):
        export_merged(
            parser.parse_args(["--out", str(tmp_path / "x"), "--base", str(sharded), "--strength", "nan"]), []
        )
    with pytest.raises(InputError, match="--strength takes one number, or two"):
        export_merged(parser.parse_args(["--base", str(sharded), "--strength", "1", "1", "1"]), adapters)


# Memory.

SIDE = 2048
SHARD_TENSORS = 3
SHARDS = 6
M_MMAP_THRESHOLD = -3


def merge_memory(folder: Path) -> None:
    """Print what a merge takes at its peak beside what was there before, and the largest shard, in bytes."""
    # Tensors of a real base are large enough that freed ones go back to the system at once; so must these.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)
    base = folder / "base"
    names = [f"blocks.{block}.attn1.to_{part}" for block in range(SHARDS) for part in "qkv"]
    weight_map = {}
    (base / "transformer").mkdir(parents=True)
    for shard in range(SHARDS):
        mine = names[shard * SHARD_TENSORS : (shard + 1) * SHARD_TENSORS]
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({f"{name}.weight": torch.full((SIDE, SIDE), 0.1) for name in mine}, base / "transformer" / file)
        weight_map |= {f"{name}.weight": file for name in mine}
    index = base / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "transformer" / "config.json").write_text("{}")
    (base / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "WanTransformer3DModel"]}))
    halves = {"A": torch.ones(4, SIDE), "B": torch.ones(SIDE, 4)}
    weights = {f"{name}.lora_{half}.weight": value for name in names for half, value in halves.items()}
    adapter = Adapter(expert="single", rank=4, alpha=4.0, targets=tuple(names), weights=weights)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes(os.getpid())
    write_merged(base, [adapter], folder / "out", dtype=torch.float32)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) << 10
    largest = max(file.stat().st_size for file in (base / "transformer").glob("*.safetensors"))
    print(json.dumps([peak - before, largest]))


def test_memory_is_bounded_by_a_shard_not_by_the_model(tmp_path):
    child = fork(merge_memory, tmp_path, log=tmp_path / "log")
    assert child.wait() == 0, child.output
    extra, shard = json.loads(child.output.splitlines()[-1])
    assert shard > SHARD_TENSORS * SIDE * SIDE * 4
    assert shard < extra <= 2.5 * shard, f"{extra >> 20} MiB for shards of {shard >> 20}"
