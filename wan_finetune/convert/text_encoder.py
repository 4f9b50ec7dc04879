"""The UMT5 encoder, under the names of Wan's authors or under those of transformers (ComfyUI's)."""

import re
from typing import Any

from ..errors import InputError
from .denoiser import count_blocks
from .parts import Part, meta_shapes, require_exact
from .weights import Weights

SPIECE = "spiece_model"
"""Under which ComfyUI keeps the tokenizer in the same file."""
WHOLE = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
IN_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def is_text_encoder(names: set[str]) -> bool:
    """Whether names are those of a UMT5 encoder, in either naming."""
    return "blocks.0.attn.q.weight" in names or "encoder.block.0.layer.0.SelfAttention.q.weight" in names


def text_encoder_names(names: set[str]) -> dict[str, str]:
    """transformers' name of each original one; a name that is unknown stays as it is."""
    renamed = {}
    for name in names:
        found = BLOCK.fullmatch(name)
        inner = IN_BLOCK.get(found[2]) if found else None
        renamed[name] = f"encoder.block.{found[1]}.{inner}" if found and inner else WHOLE.get(name, name)
    return renamed


def text_encoder_part(weights: Weights) -> Part:
    """The encoder as `UMT5EncoderModel`.

    Raises:
        InputError: weights that are missing, unknown or of other shapes.
    """
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    names = text_encoder_names(set(weights.tensors))
    config = UMT5Config(**config_of(weights, names), architectures=["UMT5EncoderModel"])
    with init_empty_weights():
        wanted = meta_shapes(UMT5EncoderModel(config))
    # One table under two names; transformers writes the first.
    wanted.pop("encoder.embed_tokens.weight", None)
    part = Part(
        folder="text_encoder",
        class_name="UMT5EncoderModel",
        library="transformers",
        weights_name="model",
        config=config.to_dict(),
        weights=weights,
        names=names,
    )
    require_exact(part, wanted)
    return part


def config_of(weights: Weights, names: dict[str, str]) -> dict[str, Any]:
    """The sizes of `UMT5Config`, from the shapes of the weights; the rest are google/umt5-xxl's defaults."""
    originals = {new: old for old, new in names.items()}
    block = "encoder.block.0.layer."
    try:
        vocabulary, width = weights.shape(originals["shared.weight"])
        buckets, heads = weights.shape(originals[f"{block}0.SelfAttention.relative_attention_bias.weight"])
        inner = weights.shape(originals[f"{block}0.SelfAttention.q.weight"])[0]
        ffn_dim = weights.shape(originals[f"{block}1.DenseReluDense.wi_0.weight"])[0]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{weights.files[0]}: is no whole UMT5 encoder: {error} is missing or has an odd shape"
        ) from None
    num_layers = count_blocks(names.values(), r"encoder\.block\.(\d+)\.", weights.files[0])
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": ffn_dim,
        "num_layers": num_layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tokenizer_class": "T5Tokenizer",
    }
