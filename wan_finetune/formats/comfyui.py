"""The ComfyUI format: original Wan names under `diffusion_model.`, with an alpha for each module."""

from pathlib import Path

import torch

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from .files import open_checked, save_atomically
from .names import DIFFUSERS_TO_ORIGINAL, ORIGINAL_TO_DIFFUSERS, rename_module

PREFIX = "diffusion_model."


def write(path: Path, adapter: Adapter) -> None:
    """Write the adapter as fp32 lora_A/lora_B with `.alpha`; a target outside the blocks' ten is refused.

    Raises:
        InputError: for a module that the original names lack.
    """
    tensors = {}
    for name, value in adapter.weights.items():
        module, half = name.split(".lora_")
        try:
            renamed = f"{PREFIX}{rename_module(module, DIFFUSERS_TO_ORIGINAL)}"
        except KeyError:
            raise InputError(f"{module} has no name in ComfyUI's format") from None
        tensors[f"{renamed}.lora_{half}"] = value
        tensors[f"{renamed}.alpha"] = torch.tensor(adapter.alpha)
    save_atomically(path, tensors, {"format": "pt", "expert": adapter.expert})


def read(path: Path, expert: ExpertName | None = None) -> Adapter:
    """Read a file that `write` wrote.

    Raises:
        InputError: for a damaged or foreign file, differing alphas, or the other expert's file.
    """
    tensors, metadata = open_checked(path)
    weights, alphas = {}, set()
    for name, value in tensors.items():
        module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX):
            raise InputError(f"{path}: {name} does not start with {PREFIX}; not a ComfyUI LoRA")
        if name.endswith(".alpha"):
            alphas.add(float(value))
            continue
        try:
            weights[f"{rename_module(module, ORIGINAL_TO_DIFFUSERS)}.lora_{rest}"] = value.to(torch.float32)
        except (KeyError, ValueError):
            raise InputError(f"{path}: {name} is no module of Wan") from None
    found = metadata.get("expert")
    if len(alphas) != 1 or found not in EXPERTS or not weights:
        raise InputError(f"{path}: says no single alpha or no expert; not written by this toolkit")
    if expert is not None and found != expert:
        raise InputError(f"{path}: is the adapter of {EXPERTS[found].title}, not of {EXPERTS[expert].title}")
    adapter = Adapter(
        expert=found,
        rank=next(value.shape[0] for name, value in weights.items() if ".lora_A." in name),
        alpha=alphas.pop(),
        targets=tuple(sorted({name.split(".lora_")[0].split(".", 2)[2] for name in weights})),
        weights=weights,
    )
    adapter.check(str(path))
    return adapter
