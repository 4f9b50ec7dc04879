"""All true names at full size, without numbers: each becomes the one that diffusers or transformers has."""

from math import prod

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.original_wan import (
    A14B,
    UMT5_XXL,
    WAN21_SMALL,
    autoencoder_shapes,
    denoiser_shapes,
    text_encoder_shapes,
)
from wan_finetune.convert.autoencoder import autoencoder_part
from wan_finetune.convert.denoiser import denoiser_part
from wan_finetune.convert.tensor_files import TensorFacts
from wan_finetune.convert.text_encoder import text_encoder_part
from wan_finetune.convert.weights import Stored, Weights


class NoFile:
    """Facts of a file of full size without its numbers."""

    def __init__(self, path, shapes):
        self.path = path
        self.tensors = {name: TensorFacts(torch.bfloat16, shape, i) for i, (name, shape) in enumerate(shapes.items())}


def full_size(tmp_path, shapes):
    file = NoFile(tmp_path / "weights.safetensors", shapes)
    return Weights({name: Stored(file, name) for name in shapes}, [file.path])


BLOCK_NAMES = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v", "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q", "cross_attn.norm_k": "attn2.norm_k",
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2", "modulation": "scale_shift_table",
}  # fmt: skip
OTHER_NAMES = {
    "patch_embedding": "patch_embedding", "head.head": "proj_out", "head.modulation": "scale_shift_table",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
}  # fmt: skip


def typed_name(name):
    """diffusers' name, from the tables above."""
    stem, kind = (name, "") if name.endswith("modulation") else name.rsplit(".", 1)
    if name.startswith("blocks."):
        _, number, inner = stem.split(".", 2)
        stem = f"blocks.{number}.{BLOCK_NAMES[inner]}"
    else:
        stem = OTHER_NAMES[stem]
    return f"{stem}.{kind}" if kind else stem


@pytest.mark.parametrize(("sizes", "heads"), [(A14B, 40), (WAN21_SMALL, 12)])
def test_all_true_names_of_a_denoiser_become_exactly_those_of_diffusers(tmp_path, sizes, heads):
    """Shapes and names are held against diffusers' model inside; here against a table that was typed."""
    shapes = denoiser_shapes(**sizes)
    part = denoiser_part(full_size(tmp_path, shapes), "transformer", None)
    assert part.names == {name: typed_name(name) for name in shapes}
    assert (part.config["num_attention_heads"], part.config["attention_head_dim"]) == (heads, 128)
    with torch.device("meta"):
        layers, ffn_dim = sizes["num_layers"], sizes["ffn_dim"]
        official = WanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn_dim)
    assert {name: tuple(value.shape) for name, value in official.state_dict().items()} == {
        part.names[name]: shape for name, shape in shapes.items()
    }
    assert {key: official.config[key] for key in part.config if key != "patch_size"} == {
        key: value for key, value in part.config.items() if key != "patch_size"
    }


def test_all_true_names_of_text_encoder_and_autoencoder_are_known(tmp_path):
    shapes = text_encoder_shapes(**UMT5_XXL)
    part = text_encoder_part(full_size(tmp_path, shapes))
    wanted = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    assert {key: part.config[key] for key in wanted} == wanted
    assert sum(map(prod, shapes.values())) == 5_680_910_336
    assert part.names["blocks.23.ffn.gate.0.weight"] == "encoder.block.23.layer.1.DenseReluDense.wi_0.weight"
    part = autoencoder_part(full_size(tmp_path, autoencoder_shapes(96)))
    assert part.config["base_dim"] == 96 and part.config["z_dim"] == 16
    assert part.names["decoder.upsamples.4.shortcut.weight"] == "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"
