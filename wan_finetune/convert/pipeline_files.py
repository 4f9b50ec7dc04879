"""The small files of a diffusers folder: what the pipeline is made of, and its scheduler."""

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .parts import Part

BOUNDARY_RATIO = 0.875
"""Share of the noise levels below which the low-noise expert takes over (`boundary` of wan_t2v_A14B.py)."""
SHIFT_A14B = 12.0
"""`sample_shift` of wan_t2v_A14B.py in Wan-Video/Wan2.2."""
SHIFT_WAN21 = 5.0
"""Default `--sample_shift` for text-to-video of generate.py in Wan-Video/Wan2.1."""
SHIFT_WAN21_SMALL = 8.0
"""What the README of Wan-Video/Wan2.1 gives for T2V-1.3B; it says 8 to 12."""
SMALL_WIDTH = 1536
"""Channels of T2V-1.3B; 14B has 5120."""
TOKENIZER_CLASS = ["transformers", "T5TokenizerFast"]


def flow_shift(denoisers: list[Part]) -> float:
    """The official shift of the noise levels in sampling."""
    if len(denoisers) == 2:
        return SHIFT_A14B
    config = denoisers[0].config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return SHIFT_WAN21_SMALL if width <= SMALL_WIDTH else SHIFT_WAN21


def scheduler_config(shift: float) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: UniPC on flow matching, as the official sampling."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    return dict(json.loads(scheduler.to_json_string()))


def model_index(parts: list[Part], components: Path | None) -> dict[str, Any]:
    """`model_index.json`.

    Args:
        parts: what was converted.
        components: the diffusers folder of which the other parts are.
    """
    import diffusers

    classes = {part.folder: [part.library, part.class_name] for part in parts}
    others = dict(read_index(components)) if components else {}
    two = "transformer_2" in classes
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": BOUNDARY_RATIO if two else None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": classes.get("text_encoder") or others["text_encoder"],
        "tokenizer": others.get("tokenizer", TOKENIZER_CLASS),
        "transformer": classes["transformer"],
        "transformer_2": classes["transformer_2"] if two else [None, None],
        "vae": classes.get("vae") or others["vae"],
    }


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a diffusers folder, of which the parts of Wan's text-to-video can be taken.

    Raises:
        InputError: of another kind of pipeline.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        kinds = {name: index[name][1] for name in ("text_encoder", "tokenizer", "vae")}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise InputError(
            f"--components-from {folder}: has no model_index.json of a pipeline with these parts"
        ) from None
    wanted = {"text_encoder": "UMT5EncoderModel", "vae": "AutoencoderKLWan"}
    for name, kind in wanted.items():
        if kinds[name] != kind:
            raise InputError(f"--components-from {folder}: its {name} is a {kinds[name]}, not a {kind}")
    return dict(index)


def part_config(part: Part, dtype: torch.dtype | None) -> dict[str, Any]:
    """`config.json` of a part that is written in `dtype`; transformers wants to be told it."""
    if part.library == "transformers":
        written = part.wanted_dtype(min(part.weights.tensors), dtype)
        return {**part.config, "dtype": str(written).removeprefix("torch.")}
    import diffusers

    return {"_class_name": part.class_name, "_diffusers_version": diffusers.__version__, **part.config}
