"""Adapters: what is injected, and that every file says and does what was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file

from tests.adapter_material import make_adapter
from wan_finetune.adapters import Adapter, LoraSettings, inject_lora, lora_weights, set_lora_weights, update_norms
from wan_finetune.errors import InputError
from wan_finetune.experts import HIGH, LOW, load_expert
from wan_finetune.export import probe_output, verify_adapter_folder, write_adapter_folder
from wan_finetune.formats import comfyui
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.pipeline import adapter_source, go_block_by_block, load_pipeline, place, read_adapters
from wan_finetune.sampling import Request, SamplingSettings, sample
from wan_finetune.spec import LORA_TARGETS

FORMATS = pytest.mark.parametrize("file_format", [diffusers_format, comfyui], ids=["diffusers", "comfyui"])


def trained(base: Path, expert, **settings) -> Adapter:
    """An adapter with weights as after some training, alpha other than the rank."""
    lora = LoraSettings(**{"rank": 4, "alpha": 7.0, **settings})
    model = load_expert(base, expert, torch.float32)
    inject_lora(model, lora, expert.name, seed=0)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: value if ".lora_A." in name else torch.randn(value.shape, generator=generator) * 0.1
        for name, value in lora_weights(model).items()
    }
    return Adapter(
        expert=expert.name, rank=lora.rank, alpha=lora.scale_alpha, targets=lora.targets, weights=weights,
        about={"trigger": "ember style", "sampling_shift": "5.0"},
    )  # fmt: skip


def changed_output(base: Path, expert, adapter: Adapter) -> torch.Tensor:
    model = load_expert(base, expert, torch.float32)
    inject_lora(model, LoraSettings(rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets), expert.name, 0)
    set_lora_weights(model, adapter.weights)
    return probe_output(model, base, adapter)


def test_a14b_has_400_linears_an_expert_in_attention_and_feed_forward():
    with torch.device("meta"):
        pair = {expert: WanTransformer3DModel() for expert in (HIGH, LOW)}
    for expert, model in pair.items():
        model.requires_grad_(False)
        inject_lora(model, LoraSettings(rank=32), expert.name, seed=0)
        lora = {name: p for name, p in model.named_parameters() if p.requires_grad}
        modules = {name.split(".lora_")[0] for name in lora}
        assert modules == {f"blocks.{block}.{target}" for block in range(40) for target in LORA_TARGETS}
        assert len(modules) == 400 and len(lora) == 800
        # Rank times the inputs and outputs of eight 5120-wide Linears and the two of the feed-forward.
        assert sum(p.numel() for p in lora.values()) == 40 * 32 * (8 * 2 * 5120 + 2 * (5120 + 13824)) == 153_354_240
        assert all(p.dtype == torch.float32 for p in lora.values())
        assert sum(p.numel() for p in model.parameters()) - 153_354_240 == 14_288_491_584
    assert not {id(p) for p in pair[HIGH].parameters()} & {id(p) for p in pair[LOW].parameters()}


@pytest.mark.parametrize("alpha", [-4.0, 0.0, float("inf"), float("nan"), 1e39, 1e-60])
def test_an_alpha_that_no_loader_stands_is_refused(tiny_base, alpha):
    adapter = trained(tiny_base, HIGH)
    for odd in (replace(adapter, alpha=alpha), replace(adapter, alphas={"blocks.0.attn1.to_q": alpha})):
        with pytest.raises(InputError, match=r"alpha is .*, and only a number above 0"):
            odd.check("it")


def test_injection_is_a_function_of_seed_and_expert(tiny_base):
    def start(expert, seed):
        model = load_expert(tiny_base, expert, torch.float32)
        inject_lora(model, LoraSettings(rank=4), expert.name, seed)
        return lora_weights(model)

    torch.manual_seed(1)
    first = start(HIGH, 3)
    torch.manual_seed(2)
    name = next(iter(first))
    assert all(torch.equal(value, start(HIGH, 3)[key]) for key, value in first.items())
    assert not torch.equal(first[name], start(HIGH, 4)[name]) and not torch.equal(first[name], start(LOW, 3)[name])


def test_an_unknown_target_is_refused(tiny_base):
    with pytest.raises(InputError, match="'to_query' matches no module"):
        inject_lora(load_expert(tiny_base, HIGH, torch.float32), LoraSettings(targets=("to_query",)), "high", 0)


@FORMATS
@pytest.mark.parametrize("targets", [LORA_TARGETS, ("attn1.to_q", "ffn.net.2")], ids=["all", "partial"])
def test_what_is_written_is_read_back_to_the_bit(tiny_base, tmp_path, file_format, targets):
    adapter = trained(tiny_base, LOW, targets=targets)
    path = tmp_path / "adapter.safetensors"
    file_format.write(path, adapter)
    back = file_format.read(path, "low")
    assert (back.expert, back.rank, back.alpha) == ("low", 4, 7.0) and set(back.targets) == set(targets)
    assert back.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(back.weights[name], value) for name, value in adapter.weights.items())
    first = path.read_bytes()
    file_format.write(path, adapter)
    assert path.read_bytes() == first, "equal adapters must be equal files"
    assert path.stat().st_mode & 0o777 == 0o666 & ~0o022


@pytest.mark.parametrize("folder", ["", "comfyui"])
def test_plain_diffusers_gives_the_trained_output_from_two_calls(tiny_base, tmp_path, folder):
    adapters = [trained(tiny_base, expert) for expert in (HIGH, LOW)]
    write_adapter_folder(tmp_path, adapters)
    pipe = WanPipeline.from_pretrained(tiny_base)
    pipe.load_lora_weights(tmp_path / folder, weight_name="high_noise.safetensors")
    pipe.load_lora_weights(tmp_path / folder, weight_name="low_noise.safetensors", load_into_transformer_2=True)
    for expert, adapter in zip((HIGH, LOW), adapters, strict=True):
        model = getattr(pipe, expert.component)
        wanted = changed_output(tiny_base, expert, adapter)
        assert torch.allclose(probe_output(model, tiny_base, adapter), wanted, atol=1e-5)
        pipe.disable_lora()
        plain = probe_output(model, tiny_base, adapter)
        pipe.enable_lora()
        assert not torch.allclose(plain, wanted, atol=1e-3)


def test_load_pipeline_gives_the_trained_output_and_the_recorded_shift(tiny_base, tmp_path):
    adapters = [trained(tiny_base, expert) for expert in (HIGH, LOW)]
    write_adapter_folder(tmp_path, [replace(a, about={"sampling_shift": "7.5"}) for a in adapters])
    pipe = load_pipeline(str(tiny_base), tmp_path, device="cpu")
    assert pipe.scheduler.config.flow_shift == 7.5
    for expert, adapter in zip((HIGH, LOW), adapters, strict=True):
        found = probe_output(getattr(pipe, expert.component), tiny_base, adapter)
        assert torch.allclose(found, changed_output(tiny_base, expert, adapter), atol=1e-5)


def test_a_repository_whose_files_have_other_names_is_told_of_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: str(tmp_path))
    with pytest.raises(InputError, match=r"'their/look': the repository has none of high_noise.safetensors, .*fetch"):
        adapter_source("their/look")
    write_adapter_folder(tmp_path, [make_adapter("high"), make_adapter("low")])
    assert [each.expert for each in read_adapters("their/look")] == ["high", "low"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "x" * 100),
        ("vae/config.json", "{"),
        ("model_index.json", "<"),
    ],
)
def test_a_damaged_base_is_told_of(tiny_base, tmp_path, file, content):
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / file).write_text(content)
    with pytest.raises(InputError, match=r"(base model .*base' cannot be opened|model_index.json: is not JSON).*again"):
        load_pipeline(str(tmp_path / "base"))


def test_strength_is_set_for_each_expert(tiny_base, tmp_path):
    adapters = [trained(tiny_base, expert) for expert in (HIGH, LOW)]
    write_adapter_folder(tmp_path, adapters)
    pipe = load_pipeline(str(tiny_base), tmp_path, strength=(0.0, 1.0), device="cpu")
    bare = probe_output(load_expert(tiny_base, HIGH, torch.float32), tiny_base, adapters[0])
    assert torch.allclose(probe_output(pipe.transformer, tiny_base, adapters[0]), bare, atol=1e-6)
    bare = probe_output(load_expert(tiny_base, LOW, torch.float32), tiny_base, adapters[1])
    assert not torch.allclose(probe_output(pipe.transformer_2, tiny_base, adapters[1]), bare, atol=1e-3)


@FORMATS
def test_the_other_experts_file_is_refused(tiny_base, tmp_path, file_format):
    file_format.write(tmp_path / "a.safetensors", trained(tiny_base, HIGH))
    with pytest.raises(InputError, match="adapter of the high-noise expert, not of the low-noise expert"):
        file_format.read(tmp_path / "a.safetensors", "low")


def test_swapped_files_are_refused(tiny_base, tmp_path):
    write_adapter_folder(tmp_path, [trained(tiny_base, expert) for expert in (HIGH, LOW)])
    high, low = tmp_path / "high_noise.safetensors", tmp_path / "low_noise.safetensors"
    other = high.read_bytes()
    high.write_bytes(low.read_bytes())
    low.write_bytes(other)
    with pytest.raises(InputError, match="are the two swapped"):
        load_pipeline(str(tiny_base), tmp_path, device="cpu")


def damaged(adapter: Adapter, **changes) -> Adapter:
    weights = dict(adapter.weights)
    for name, value in changes.items():
        weights[name] = value
    return replace(adapter, weights={k: v for k, v in weights.items() if v is not None})


def test_dead_incomplete_and_insane_adapters_are_refused(tiny_base):
    adapter = trained(tiny_base, HIGH)
    b = "blocks.0.attn1.to_q.lora_B.weight"
    cases = {
        "does nothing in 1 modules": {b: torch.zeros_like(adapter.weights[b])},
        "without its other half": {b: None},
        "not finite": {b: torch.full_like(adapter.weights[b], float("nan"))},
        "not a matrix of floats": {b: adapter.weights[b].int()},
        "has rank 5": {b: torch.ones(adapter.weights[b].shape[0], 5)},
        "no weight of a Wan LoRA": {"_orig_mod.x": torch.ones(1, 1)},
    }
    adapter.check("it")
    for message, change in cases.items():
        with pytest.raises(InputError, match=message):
            damaged(adapter, **change).check("it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header is missing"),
        (b"hello, this is text", "its header is missing, cut or oversized"),
        ((2**62).to_bytes(8, "little") + b"{}", "oversized"),
        ((4).to_bytes(8, "little") + b"{]  ", "not JSON"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused_before_it_is_mapped(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        diffusers_format.read(tmp_path / "a.safetensors")


def test_a_file_of_another_tool_is_refused_by_name(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="not a diffusers LoRA"):
        diffusers_format.read(tmp_path / "a.safetensors")


def test_metadata_is_minimal_and_names_the_expert(tiny_base, tmp_path):
    diffusers_format.write(tmp_path / "a.safetensors", trained(tiny_base, LOW))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config.keys() == {"transformer.r", "transformer.lora_alpha", "transformer.target_modules"}
    about = json.loads(metadata["wan_finetune"])
    assert about["expert"] == "low" and about["component"] == "transformer_2"
    assert str(tiny_base) not in json.dumps(metadata)


def test_verification_notices_a_lost_alpha_and_a_dead_file(tiny_base, tmp_path):
    adapter = trained(tiny_base, HIGH)
    write_adapter_folder(tmp_path, [adapter])
    verify_adapter_folder(str(tiny_base), tmp_path, [adapter])
    diffusers_format.write(tmp_path / "high_noise.safetensors", replace(adapter, alpha=4.0))
    with pytest.raises(RuntimeError, match="not what was trained"):
        verify_adapter_folder(str(tiny_base), tmp_path, [adapter])
    write_adapter_folder(tmp_path, [adapter])
    comfyui.write(tmp_path / "comfyui" / "high_noise.safetensors", replace(adapter, alpha=4.0))
    with pytest.raises(RuntimeError, match="another output"):
        verify_adapter_folder(str(tiny_base), tmp_path, [adapter])


def test_update_norm_is_that_of_the_product(tiny_base):
    adapter = trained(tiny_base, HIGH)
    name = "blocks.1.ffn.net.2"
    a, b = (adapter.weights[f"{name}.lora_{half}.weight"] for half in "AB")
    assert update_norms(adapter)[name] == pytest.approx(float((7.0 / 4.0 * b @ a).norm()), rel=1e-5)


def test_an_adapter_of_another_size_of_model_is_refused(tiny_base, tmp_path):
    adapter = trained(tiny_base, HIGH)
    wrong = replace(adapter, weights={k: v for k, v in adapter.weights.items() if k.startswith("blocks.0.")})
    write_adapter_folder(tmp_path, [wrong], with_comfyui=False)
    with pytest.raises(InputError, match="does not fit this base"):
        load_pipeline(str(tiny_base), tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("room", "wanted"),
    [(1.01, "to"), (0.99, "enable_model_cpu_offload"), (0.01, "enable_group_offload")],
)
def test_a_gpu_too_small_for_both_experts_takes_one_part_or_one_block_at_a_time(tiny_base, monkeypatch, room, wanted):
    called = []
    pipe = WanPipeline.from_pretrained(tiny_base)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    free_bytes = room / 0.8 * sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    for name in ("to", "enable_model_cpu_offload", "enable_group_offload"):
        monkeypatch.setattr(WanPipeline, name, lambda self, *a, name=name, **k: called.append(name))
    called.clear()
    place(pipe, torch.device("cuda"))
    assert called == [wanted]


def test_block_by_block_the_clips_are_the_same(tiny_base, tmp_path):
    write_adapter_folder(tmp_path, [trained(tiny_base, expert) for expert in (HIGH, LOW)])
    request, settings = (
        [Request(prompt="a red circle", seed=3)],
        SamplingSettings(width=64, height=64, num_frames=5, steps=3),
    )
    plain = load_pipeline(str(tiny_base), tmp_path, device="cpu")
    small = load_pipeline(str(tiny_base), tmp_path, device="cpu")
    go_block_by_block(small, torch.device("cpu"))
    assert np.array_equal(sample(plain, request, settings)[0], sample(small, request, settings)[0])
