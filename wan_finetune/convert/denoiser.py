"""A denoiser under its original names: what it is, its configuration from the shapes, and diffusers' names."""

import json
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InputError
from .parts import Part, meta_shapes, require_exact
from .weights import Weights

HEAD_DIM = 128
"""Channels of a head in every published Wan denoiser; the weights do not show it."""
EPS = 1e-6
"""Of all norms, in every published configuration."""
FOREIGN_KEYS = {
    "vace_": "VACE, a denoiser that follows a control video",
    "face_adapter.": "Wan-Animate, which follows a face and a pose",
    "motion_encoder.": "Wan-Animate, which follows a face and a pose",
    "pose_patch_embedding.": "Wan-Animate, which follows a face and a pose",
    "casual_audio_encoder.": "S2V, which follows speech",
    "audio_proj.": "a denoiser that follows sound",
    "control_adapter.": "a denoiser that follows a camera",
    "ref_conv.": "Fun-Control, which follows a reference picture",
    "img_emb.": "I2V, which starts from a picture",
}
"""Names by which other models than text-to-video are told."""


def kind_refused(weights: Weights) -> str | None:
    """What a denoiser is, if it is none for text-to-video; None if it is one."""
    for start, kind in FOREIGN_KEYS.items():
        if any(name.startswith(start) for name in weights.tensors):
            return kind
    width, channels, *_ = (*weights.shape("patch_embedding.weight"), 0, 0)
    if channels == 48 and width == 3072:
        return "TI2V-5B, which has another autoencoder (48 latent channels) and sees a picture"
    if channels == 36:
        return "I2V: it takes 36 channels, 20 of them a picture"
    if channels != 16:
        return f"a denoiser of {channels} input channels; text-to-video ones have 16"
    return None


def is_denoiser(names: set[str]) -> bool:
    """Whether names, without prefix, are those of a Wan denoiser as published."""
    return {"patch_embedding.weight", "head.modulation"} <= names


def denoiser_part(weights: Weights, folder: str, config_file: Path | None) -> Part:
    """A denoiser as `WanTransformer3DModel`.

    Args:
        folder: `transformer` or `transformer_2`.
        config_file: the original `config.json`, if there is one.

    Raises:
        InputError: another kind of model; weights that are missing, unknown or of other shapes; a configuration
            that says something else than the weights.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    source = weights.files[0]
    if kind := kind_refused(weights):
        raise InputError(
            f"{source}: is {kind}. Only text-to-video denoisers are converted (Wan2.2-T2V-A14B, Wan2.1-T2V)"
        )
    said = read_config(config_file) if config_file else {}
    config = config_of(weights, source, said.get("num_heads"), said.get("eps", EPS))
    if config_file:
        require_same(config_file, said, config)
    # The library's function moves values from old keys to new ones, so that names as values give the map.
    renamed = convert_wan_transformer_to_diffusers({name: name for name in weights.tensors})
    part = Part(
        folder=folder,
        class_name="WanTransformer3DModel",
        library="diffusers",
        weights_name="diffusion_pytorch_model",
        config=config,
        weights=weights,
        names={old: new for new, old in renamed.items()},
        kept_fp32=frozenset(WanTransformer3DModel._keep_in_fp32_modules),
    )
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(config)
    require_exact(part, meta_shapes(model))
    return part


def config_of(weights: Weights, source: Path, num_heads: int | None, eps: float) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of the weights and the two numbers that they do not show."""
    try:
        width, channels, *patch = weights.shape("patch_embedding.weight")
        ffn_dim = weights.shape("blocks.0.ffn.0.weight")[0]
        text_dim = weights.shape("text_embedding.0.weight")[1]
        freq_dim = weights.shape("time_embedding.0.weight")[1]
        out_channels = weights.shape("head.head.weight")[0] // prod(patch)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{source}: is no whole denoiser: {error} is missing or has an odd shape") from None
    if num_heads is None and width % HEAD_DIM:
        raise InputError(
            f"{source}: {width} channels are no multiple of {HEAD_DIM}, a head's in every published denoiser; "
            "put the original config.json beside it"
        )
    heads = num_heads or width // HEAD_DIM
    if width % heads:
        raise InputError(f"{source}: {width} channels cannot be shared by {heads} heads, as config.json says")
    num_layers = count_blocks(weights.tensors, r"blocks\.(\d+)\.", source)
    return {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out_channels,
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
        "cross_attn_norm": "blocks.0.norm3.weight" in weights.tensors,
        "qk_norm": "rms_norm_across_heads",
        "eps": eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def count_blocks(names: Iterable[str], pattern: str, source: Path) -> int:
    """How many blocks there are, by the numbers in their names.

    Raises:
        InputError: one is missing, or a number is far beyond the others.
    """
    numbers = {int(found[1]) for name in names if (found := re.match(pattern, name))}
    if missing := set(range(len(numbers))) - numbers:
        raise InputError(f"{source}: block {min(missing)} of {max(numbers) + 1} is missing; fetch the rest")
    return len(numbers)


def read_config(path: Path) -> dict[str, Any]:
    """The original `config.json`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object")
    for key, kind in (("num_heads", int), ("eps", float)):
        value = config.get(key, kind(1))
        if type(value) is not kind or not value > 0:
            raise InputError(f"{path}: {key} is {value!r}, which is no such number")
    return config


def require_same(path: Path, said: dict[str, Any], config: dict[str, Any]) -> None:
    """What the original configuration says is what the weights show."""
    if said.get("model_type", "t2v") != "t2v":
        raise InputError(f"{path}: model_type is {said['model_type']!r}; only text-to-video ('t2v') is converted")
    shown = {
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "text_dim": config["text_dim"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "num_layers": config["num_layers"],
        "patch_size": config["patch_size"],
        "cross_attn_norm": config["cross_attn_norm"],
        "qk_norm": True,
    }
    for key, value in shown.items():
        if key in said and said[key] != value:
            raise InputError(
                f"{path}: {key} is {said[key]}, the weights beside it show {value}; are the files mixed up?"
            )
