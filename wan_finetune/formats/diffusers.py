"""The diffusers format: one file an expert, keys under `transformer.`, for `WanPipeline.load_lora_weights`.

diffusers reads both experts' files with the prefix `transformer.`; the second goes in with
`load_into_transformer_2=True`. So the expert is written into the metadata, and `read` refuses the wrong one.
"""

import json
from pathlib import Path

import torch

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from .files import open_checked, save_atomically

PREFIX = "transformer."
ABOUT = "wan_finetune"
"""Metadata key of our own facts, one JSON object."""


def write(path: Path, adapter: Adapter) -> None:
    """Write the adapter as fp32; without `lora_adapter_metadata` diffusers would take alpha to be the rank."""
    config = {
        f"{PREFIX}r": adapter.rank,
        f"{PREFIX}lora_alpha": adapter.alpha,
        f"{PREFIX}target_modules": sorted(adapter.targets),
    }
    about = {"expert": adapter.expert, "component": EXPERTS[adapter.expert].component, **adapter.about}
    save_atomically(
        path,
        {f"{PREFIX}{name}": value for name, value in adapter.weights.items()},
        {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True), ABOUT: json.dumps(about)},
    )


def read(path: Path, expert: ExpertName | None = None) -> Adapter:
    """Read and check an adapter; `expert`, when given, must be the file's own.

    Raises:
        InputError: for a damaged or foreign file, or one of the other expert.
    """
    tensors, metadata = open_checked(path)
    if stray := next((name for name in tensors if not name.startswith(PREFIX)), None):
        raise InputError(f"{path}: {stray} does not start with {PREFIX}; not a diffusers LoRA")
    try:
        config, about = json.loads(metadata["lora_adapter_metadata"]), json.loads(metadata[ABOUT])
        adapter = Adapter(
            expert=about.pop("expert"),
            rank=int(config[f"{PREFIX}r"]),
            alpha=float(config[f"{PREFIX}lora_alpha"]),
            targets=tuple(config[f"{PREFIX}target_modules"]),
            weights={name.removeprefix(PREFIX): value.to(torch.float32) for name, value in tensors.items()},
            about={key: value for key, value in about.items() if key != "component"},
        )
    except (KeyError, ValueError, AttributeError, TypeError):
        raise InputError(f"{path}: its metadata lacks expert, rank or alpha; not written by this toolkit") from None
    if adapter.expert not in EXPERTS:
        raise InputError(f"{path}: unknown expert {adapter.expert!r}")
    if expert is not None and adapter.expert != expert:
        raise InputError(
            f"{path}: is the adapter of {EXPERTS[adapter.expert].title}, not of {EXPERTS[expert].title}; "
            "are the two swapped?"
        )
    adapter.check(str(path))
    return adapter
