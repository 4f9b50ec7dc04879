"""The diffusers format: one file an expert, keys under `transformer.`, for `WanPipeline.load_lora_weights`.

diffusers reads both experts' files with the prefix `transformer.`; the second goes in with
`load_into_transformer_2=True`. So the expert is written into the metadata, and `read` refuses the wrong one.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from .files import ABOUT, about_of, checked_expert, open_checked, save_atomically

PREFIX = "transformer."
CONFIG = "lora_adapter_metadata"
"""Metadata key of PEFT's settings; without it diffusers takes alpha to be the rank."""
PATTERN_KEY = re.compile(r"\^?[\w.\\]+")
"""What a pattern in a file may be: a name. An expression from a stranger could take forever."""


def write(path: Path, adapter: Adapter) -> None:
    """Write the adapter as fp32, with the settings that PEFT needs and no more."""
    config = {f"{PREFIX}{key}": value for key, value in adapter.peft_config().items()}
    about = {"expert": adapter.expert, "component": EXPERTS[adapter.expert].component, **adapter.about}
    save_atomically(
        path,
        {f"{PREFIX}{name}": value for name, value in adapter.weights.items()},
        {"format": "pt", CONFIG: json.dumps(config, sort_keys=True), ABOUT: json.dumps(about)},
    )


def read(path: Path, expert: ExpertName | None = None) -> Adapter:
    """Read and check an adapter, ours or one that `save_lora_weights` of diffusers wrote.

    Args:
        expert: which expert's it must be; a file that does not say is taken for this one's.

    Raises:
        InputError: for a damaged or foreign file, or one of the other expert.
    """
    tensors, metadata = open_checked(path)
    if stray := next((name for name in tensors if not name.startswith(PREFIX)), None):
        raise InputError(f"{path}: {stray} does not start with {PREFIX}; not a diffusers LoRA")
    weights = {name.removeprefix(PREFIX): value.to(torch.float32) for name, value in tensors.items()}
    about = about_of(path, metadata)
    found = checked_expert(path, about.pop("expert", None), expert)
    about.pop("component", None)
    try:
        config = json.loads(metadata[CONFIG]) if CONFIG in metadata else {}
        config = {key.removeprefix(PREFIX): value for key, value in config.items()}
        adapter = from_config(found, weights, config, about)
    except (KeyError, ValueError, AttributeError, TypeError):
        raise InputError(f"{path}: its metadata ({CONFIG}) are none of PEFT's") from None
    adapter.check(str(path))
    return adapter


def from_config(
    expert: ExpertName, weights: Mapping[str, Tensor], config: Mapping[str, Any], about: Mapping[str, str]
) -> Adapter:
    """The adapter that PEFT would make of these weights under this configuration; without one, alpha is the rank."""
    shapes = {name.rpartition(".lora_")[0]: value.shape[0] for name, value in weights.items() if ".lora_A." in name}
    most = Counter(shapes.values()).most_common()[0][0] if shapes else 0
    rank = int(config["r"]) if config else most
    # Each module's own rank is its alpha where nothing else is said, as diffusers has it.
    alpha = float(config["lora_alpha"] if config else most)
    ranks = config.get("rank_pattern") or ({} if config else shapes)
    alphas = config.get("alpha_pattern") or ({} if config else shapes)
    targets = config.get("target_modules", ())
    ranks = {module: int(said) for module in shapes if (said := resolved(ranks, module)) not in (None, rank)}
    alphas = {module: float(said) for module in shapes if (said := resolved(alphas, module)) not in (None, alpha)}
    return Adapter(
        expert=expert,
        rank=rank,
        alpha=alpha,
        # An expression, or nothing at all: the modules by name are as exact.
        targets=tuple(targets) if targets and not isinstance(targets, str) else tuple(sorted(shapes)),
        weights=weights,
        ranks=ranks,
        alphas=alphas,
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", any(name.endswith(".lora_magnitude_vector") for name in weights))),
        about=about,
    )


def resolved(patterns: Mapping[str, float], module: str) -> float | None:
    """What PEFT's patterns say of a module (peft.utils.other.get_pattern_key), None where nothing."""
    for key, value in patterns.items():
        if not PATTERN_KEY.fullmatch(key):
            raise ValueError(key)
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None
