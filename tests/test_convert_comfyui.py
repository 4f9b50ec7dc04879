"""Single files as ComfyUI has them: prefixes, fp8 plain and scaled in both notations, the tokenizer inside."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from tests.original_checkpoints import tiny_autoencoder, tiny_text_encoder, write_a14b
from tests.original_wan import denoiser_shapes, random_weights
from tests.test_convert_names import typed_name
from wan_finetune.cli import main
from wan_finetune.convert import tensor_files
from wan_finetune.convert.job import convert
from wan_finetune.convert.planning import ConvertSettings
from wan_finetune.pocket.text import make_tokenizer

WIDE = {"dim": 128, "ffn_dim": 40, "num_layers": 2, "text_dim": 32, "freq_dim": 16}
"""One head of 128: single files have no config.json that could say another size."""
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def wide_denoiser(seed):
    return random_weights(denoiser_shapes(**WIDE), seed)


def is_matrix(name, value):
    return name.startswith("blocks.") and value.ndim == 2


def scaled(weights, weight_name, input_name, dtype=E4M3, per_row=False, extra=lambda layer: {}):
    """Block matrices as fp8 with scales, and what they stand for."""
    stored, meant = {}, {}
    for name, value in weights.items():
        if not is_matrix(name, value):
            stored[name] = meant[name] = value
            continue
        layer = name.removesuffix(".weight")
        scale = value.abs().amax(dim=1, keepdim=True) if per_row else value.abs().amax()
        scale = scale / torch.finfo(dtype).max
        stored[name] = (value / scale).to(dtype)
        stored[f"{layer}.{weight_name}"] = scale
        stored[f"{layer}.{input_name}"] = torch.tensor(0.25)
        stored |= extra(layer)
        meant[name] = stored[name].float() * scale
    return stored, meant


def described(said):
    """The uint8 text by which newer files describe a layer."""
    return lambda layer: {f"{layer}.comfy_quant": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)}


def plain(dtype):
    def make(weights):
        stored = {name: value.to(dtype) if is_matrix(name, value) else value for name, value in weights.items()}
        return stored, {name: value.float() for name, value in stored.items()}

    return make


def scaled_old(dtype):
    def make(weights):
        stored, meant = scaled(weights, "scale_weight", "scale_input", dtype)
        return {"scaled_fp8": torch.zeros(2, dtype=dtype), **stored}, meant

    return make


def scaled_new(**options):
    def make(weights):
        said = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        return scaled(weights, "weight_scale", "input_scale", extra=described(said), **options)

    return make


KINDS = {
    "bf16": plain(torch.bfloat16),
    "fp16": plain(torch.float16),
    "fp8_e4m3": plain(E4M3),
    "fp8_e5m2": plain(E5M2),
    "scaled_e4m3": scaled_old(E4M3),
    "scaled_e5m2": scaled_old(E5M2),
    "comfy_quant": scaled_new(),
    "comfy_quant_rows": scaled_new(per_row=True),
}


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """A diffusers folder to take the other parts from."""
    folder = tmp_path_factory.mktemp("components")
    write_a14b(folder / "original")
    convert(ConvertSettings(checkpoint=folder / "original", out=folder / "diffusers", verify=False))
    return folder / "diffusers"


def converted(tmp_path, file, components, **options):
    out = tmp_path / "out"
    convert(ConvertSettings(checkpoint=file, out=out, components_from=components, **{"dtype": "fp32", **options}))
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_single_file_becomes_the_numbers_that_it_stands_for(tmp_path, components, kind, monkeypatch):
    # Several reads of a matrix, each with the scales of its rows.
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 3_000)
    stored, meant = KINDS[kind](wide_denoiser(1))
    prefix = "model.diffusion_model." if "scaled" in kind else "diffusion_model." if kind == "fp16" else ""
    file = tmp_path / "wan2.1_t2v.safetensors"
    save_file({f"{prefix}{name}": value.contiguous() for name, value in stored.items()}, file)
    weights = converted(tmp_path, file, components)
    assert weights.keys() == {typed_name(name) for name in meant}
    for name, value in meant.items():
        assert torch.equal(weights[typed_name(name)], value), name


def test_the_head_of_the_file_may_say_how_layers_are_quantised(tmp_path, components):
    stored, meant = scaled(wide_denoiser(1), "weight_scale", "input_scale")
    layers = {
        name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for name in stored if "weight_scale" in name
    }
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, tmp_path / "wan.safetensors", metadata=metadata)
    weights = converted(tmp_path, tmp_path / "wan.safetensors", components, dtype="keep")
    name = "blocks.1.ffn.2.weight"
    assert torch.equal(weights[typed_name(name)], meant[name].bfloat16()), "fp8 is unpacked to bf16"
    assert weights[typed_name("blocks.1.norm3.weight")].dtype == torch.float32


def spiece_model():
    """A sentencepiece model of the pocket tokenizer's pieces, as bytes in a tensor."""
    model = import_protobuf().ModelProto()
    tokenizer = make_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    for piece, score in vocabulary:
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.unk_id = 2
    return torch.tensor(list(model.SerializeToString()), dtype=torch.uint8)


def comfyui_text_encoder():
    """transformers' names, as ComfyUI has them, and the tokenizer."""
    from wan_finetune.convert.text_encoder import text_encoder_names

    weights = tiny_text_encoder()
    names = text_encoder_names(set(weights))
    return {names[name]: value.half() for name, value in weights.items()} | {"spiece_model": spiece_model()}


def write_models_folder(folder):
    """ComfyUI's `models/`."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        (folder / name).mkdir(parents=True)
    for side, seed in (("high", 1), ("low", 2)):
        save_file(wide_denoiser(seed), folder / "diffusion_models" / f"wan2.2_t2v_{side}_noise_14B_fp16.safetensors")
    save_file(comfyui_text_encoder(), folder / "text_encoders" / "umt5_xxl_fp16.safetensors")
    autoencoder = {name: value.bfloat16() for name, value in tiny_autoencoder().items()}
    save_file(autoencoder, folder / "vae" / "wan_2.1_vae.safetensors")


def test_a_models_folder_of_comfyui_is_told_apart_by_names_and_keys(tmp_path):
    write_models_folder(tmp_path / "models")
    assert main(["convert", str(tmp_path / "models"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    for part, seed in (("transformer", 1), ("transformer_2", 2)):
        weights = load_file(tmp_path / "out" / part / "diffusion_pytorch_model.safetensors")
        meant = wide_denoiser(seed)
        assert all(torch.equal(weights[typed_name(name)], value) for name, value in meant.items())
    text_encoder = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert torch.equal(text_encoder["shared.weight"], tiny_text_encoder()["token_embedding.weight"].half().float())
    assert "spiece_model" not in text_encoder
    original, tokenizer = make_tokenizer(), T5TokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
    for prompt in (
        "a red circle moves up in a desert",
        "沙漠里，一个红色的圆形向上移动。",
        " Two  spaces, <unknown> 7!",
        "",
    ):
        assert tokenizer(prompt).input_ids == original(prompt).input_ids
    vae = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(value.dtype == torch.float32 for value in vae.values())


def test_experts_whose_names_say_nothing_are_told_by_their_options(tmp_path, components):
    for name, seed in (("a", 1), ("b", 2)):
        save_file(wide_denoiser(seed), tmp_path / f"{name}.safetensors")
    high, low = tmp_path / "b.safetensors", tmp_path / "a.safetensors"
    out = tmp_path / "out"
    convert(ConvertSettings(checkpoint=tmp_path, out=out, high=high, low=low, components_from=components, dtype="fp32"))
    name = "blocks.0.ffn.0.weight"
    for part, seed in (("transformer", 2), ("transformer_2", 1)):
        weights = load_file(out / part / "diffusion_pytorch_model.safetensors")
        assert torch.equal(weights[typed_name(name)], wide_denoiser(seed)[name])


def test_parts_of_another_diffusers_folder_are_taken_over_to_the_byte(tmp_path, components):
    save_file(wide_denoiser(1), tmp_path / "wan.safetensors")
    (components / "vae" / "pickled.bin").write_bytes(b"not taken")
    converted(tmp_path, tmp_path / "wan.safetensors", components)
    (components / "vae" / "pickled.bin").unlink()
    for part in ("text_encoder", "tokenizer", "vae"):
        taken = {path.name: path.read_bytes() for path in (tmp_path / "out" / part).iterdir()}
        assert taken == {path.name: path.read_bytes() for path in (components / part).iterdir()}


def test_a_scaled_text_encoder_is_unpacked(tmp_path, components):
    weights = {name: value.float() for name, value in comfyui_text_encoder().items() if name != "spiece_model"}
    stored = dict(weights)
    for name, value in weights.items():
        if "SelfAttention.q" in name or "wi_0" in name:
            scale = value.abs().amax() / 448
            stored[name] = (value / scale).to(E4M3)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            weights[name] = stored[name].float() * scale
    # A table is stored without a scale.
    stored["shared.weight"] = weights["shared.weight"].to(E4M3)
    weights["shared.weight"] = stored["shared.weight"].float()
    stored["scaled_fp8"] = torch.zeros(0, dtype=E4M3)
    save_file(stored, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    save_file(wide_denoiser(1), tmp_path / "wan.safetensors")
    converted(
        tmp_path,
        tmp_path / "wan.safetensors",
        components,
        text_encoder=tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    )
    written = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], value) for name, value in weights.items())
