"""Other kinds of models, quantisation and files are refused by their names, with a reason."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.original_checkpoints import tiny_autoencoder, tiny_denoiser, tiny_text_encoder, wide
from wan_finetune.convert import planning
from wan_finetune.convert.job import convert
from wan_finetune.convert.planning import ConvertSettings
from wan_finetune.convert.recognition import expert_in_name
from wan_finetune.convert.tensor_files import open_tensors, read_whole
from wan_finetune.convert.tokenizer import tokenizer_from_spiece
from wan_finetune.convert.weights import collect
from wan_finetune.errors import InputError


def single(tmp_path, weights, name="wan.safetensors"):
    save_file(weights, tmp_path / name)
    return ConvertSettings(checkpoint=tmp_path / name, out=tmp_path / "out")


ONE = torch.ones(1)
KINDS = {
    "I2V: it takes 36 channels": wide(36),
    "a denoiser of 48 input channels": wide(48),
    "VACE": wide(**{"vace_blocks.0.after_proj.bias": ONE}),
    "Wan-Animate": wide(**{"motion_encoder.dec.direction.weight": ONE}),
    "S2V, which follows speech": wide(**{"casual_audio_encoder.weights": ONE}),
    "follows a camera": wide(**{"control_adapter.conv.weight": ONE}),
    "Fun-Control": wide(**{"ref_conv.weight": ONE}),
    "I2V, which starts from a picture": wide(**{"img_emb.proj.0.bias": ONE}),
    "diffusers' names already": {"condition_embedder.time_proj.weight": ONE},
    "is a LoRA, not a model": {"diffusion_model.blocks.0.ffn.0.lora_A.weight": ONE},
    "is a text encoder": tiny_text_encoder(),
    "is an autoencoder": tiny_autoencoder(),
    "is no Wan denoiser ('double_blocks.0.weight'": {"double_blocks.0.weight": ONE},
    "24 channels are no multiple of 128": tiny_denoiser(1),
    "block 1 of 8 is missing": wide(**{"blocks.7.modulation": ONE}),
    "is no whole denoiser": wide() | {"head.head.weight": torch.tensor(1.0)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_model_is_refused_by_its_name(tmp_path, kind):
    settings = single(tmp_path, KINDS[kind])
    with pytest.raises(InputError) as caught:
        planning.one_denoiser(planning.Denoiser((settings.checkpoint,)), "transformer")
    assert kind in str(caught.value)


def test_the_5b_model_is_told_by_its_width(tmp_path):
    header = {"patch_embedding.weight": torch.zeros(3072, 48, 1, 2, 2, dtype=torch.bfloat16), "head.modulation": ONE}
    settings = single(tmp_path, header)
    with pytest.raises(InputError, match="TI2V-5B, which has another autoencoder"):
        planning.one_denoiser(planning.Denoiser((settings.checkpoint,)), "transformer")


def described(**said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


LAYER = "blocks.0.ffn.0"
FP8 = torch.zeros(8, 128, dtype=torch.float8_e4m3fn)
QUANTISED = {
    "scale one weight": {f"{LAYER}.weight_scale": ONE, f"{LAYER}.scale_weight": ONE + 1},
    "is quantised as nvfp4": {f"{LAYER}.comfy_quant": described(format="nvfp4")},
    "is quantised as float8_e4m3fn, convrot": {f"{LAYER}.comfy_quant": described(format="float8_e4m3fn", convrot=True)},
    "says in an unknown way": {f"{LAYER}.comfy_quant": torch.tensor([123], dtype=torch.uint8)},
    "is int8, which is no weight": {f"{LAYER}.weight": FP8.to(torch.int8), f"{LAYER}.weight_scale": ONE},
    "has no scale": {f"{LAYER}.weight": FP8, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)},
    "has a scale of the shape [4, 64]": {f"{LAYER}.weight": FP8, f"{LAYER}.weight_scale": torch.ones(4, 64)},
    "blocks.9.ffn.0.scale_weight scales a weight that the file does not hold": {"blocks.9.ffn.0.scale_weight": ONE},
}


@pytest.mark.parametrize("message", QUANTISED)
def test_quantisation_that_is_not_understood_is_refused(tmp_path, message):
    settings = single(tmp_path, wide() | QUANTISED[message])
    with pytest.raises(InputError) as caught:
        planning.one_denoiser(planning.Denoiser((settings.checkpoint,)), "transformer")
    assert message in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_a_table_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, changes):
    """No other exception, and never more than the file holds."""
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file({"a": torch.ones(3, 4), "bb": torch.ones(5, dtype=torch.float16)}, file, metadata={"format": "pt"})
    content = bytearray(file.read_bytes())
    for place, value in changes:
        content[place % (len(content) - 58)] = value
    file.write_bytes(content)
    try:
        opened = open_tensors(file)
    except InputError as error:
        assert str(error).startswith(str(file))
    else:
        for name, facts in opened.tensors.items():
            assert read_whole(opened, name).shape == facts.shape
        assert sum(facts.num_bytes for facts in opened.tensors.values()) <= len(content)


def test_gguf_is_refused_with_what_to_use_instead(tmp_path, capsys):
    (tmp_path / "wan.gguf").write_bytes(b"GGUF")
    (tmp_path / "wan.ckpt").write_bytes(b"?")
    for name, message in (("wan.gguf", "GGUF weights are quantised for good"), ("wan.ckpt", "neither a .safetensors")):
        with pytest.raises(InputError, match=message):
            planning.one_denoiser(planning.Denoiser((tmp_path / name,)), "transformer")


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low"),
        ("Wan2_2-T2V-A14B_HIGH_bf16.safetensors", "high"),
        ("lownoise.safetensors", "low"),
        ("high.safetensors", "high"),
        ("wan2.1_t2v_14B_bf16.safetensors", None),
        ("slow_motion_wan.safetensors", None),
        ("highway_flow.safetensors", None),
        ("high_and_low.safetensors", None),
    ],
)
def test_a_name_says_which_expert_or_nothing(tmp_path, name, expert):
    assert expert_in_name(tmp_path / name) == expert


def test_experts_that_cannot_be_told_apart_are_asked_for(tmp_path):
    for name in ("a_high", "b_high", "c_low"):
        save_file(wide(), tmp_path / f"{name}.safetensors")
    with pytest.raises(
        InputError, match=r"a_high.safetensors, b_high.safetensors, c_low.safetensors.*--high FILE --low"
    ):
        convert(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out"))
    with pytest.raises(InputError, match="is the high-noise expert of two by its name; give both"):
        convert(ConvertSettings(checkpoint=tmp_path / "a_high.safetensors", out=tmp_path / "out"))
    one, other = tmp_path / "a_high.safetensors", tmp_path / "c_low.safetensors"
    with pytest.raises(InputError, match="--high is given without --low"):
        convert(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out", high=one))
    with pytest.raises(InputError, match="is given as both experts"):
        convert(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out", high=one, low=one))
    with pytest.raises(InputError, match=r"c_low.safetensors: is the low-noise expert by its name; are .* swapped"):
        convert(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out", high=other, low=one))
    save_file(wide(dim=256), other)
    with pytest.raises(InputError, match="not two experts of one model: num_attention_heads is 1 and 2"):
        convert(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out", high=one, low=other))


def test_a_file_that_was_not_fetched_is_named_where_its_kind_is_missing(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "wan_high.safetensors").write_text(pointer)
    with pytest.raises(InputError, match=r"wan_high.safetensors cannot be read as safetensors; fetch again"):
        convert(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out"))
    save_file(wide(), tmp_path / "wan.safetensors")
    (tmp_path / "wan_high.safetensors").rename(tmp_path / "umt5_xxl.safetensors")
    with pytest.raises(InputError, match=r"holds no text encoder .*umt5_xxl.safetensors cannot be read"):
        convert(ConvertSettings(checkpoint=tmp_path / "wan.safetensors", out=tmp_path / "out"))


def test_a_sentencepiece_model_that_is_none_is_refused(tmp_path):
    for content in (b"no model", b"", bytes(range(256))):
        file = tmp_path / "text.safetensors"
        save_file({"spiece_model": torch.tensor(list(content), dtype=torch.uint8), "shared.weight": ONE}, file)
        stored = collect([file], extras=("spiece_model",)).extras["spiece_model"]
        with pytest.raises(InputError, match="is no sentencepiece model of UMT5; give the tokenizer by --tokenizer"):
            tokenizer_from_spiece(stored, 300)
