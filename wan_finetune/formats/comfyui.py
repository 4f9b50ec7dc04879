"""The ComfyUI format: original Wan names under `diffusion_model.`, with an alpha for each module."""

import json
from collections import Counter
from pathlib import Path

import torch

from ..adapters import Adapter
from ..errors import InputError
from ..experts import ExpertName
from .files import ABOUT, about_of, checked_expert, open_checked, save_atomically
from .names import DIFFUSERS_TO_ORIGINAL, ORIGINAL_TO_DIFFUSERS, rename_module

PREFIX = "diffusion_model."
TARGETS = "targets"
"""Among our own facts: the tensors' names do not tell a target of every block from one of some."""


def refusal(adapter: Adapter) -> str | None:
    """Why an adapter cannot be written in this format, or None."""
    if adapter.dora:
        return "a DoRA is not written for ComfyUI: its dora_scale makes diffusers' reader of that format fail"
    return None


def write(path: Path, adapter: Adapter) -> None:
    """Write the adapter as fp32 lora_A/lora_B with `.alpha`; a target outside the blocks' ten is refused.

    The format knows alpha / rank alone, so rsLoRA's root of the rank goes into alpha.

    Raises:
        InputError: for a DoRA, or a module that the original names lack.
    """
    if reason := refusal(adapter):
        raise InputError(f"{path}: {reason}")
    tensors = {}
    for name, value in adapter.weights.items():
        module, half = name.split(".lora_")
        try:
            renamed = f"{PREFIX}{rename_module(module, DIFFUSERS_TO_ORIGINAL)}"
        except KeyError:
            raise InputError(f"{module} has no name in ComfyUI's format") from None
        tensors[f"{renamed}.lora_{half}"] = value
        rank = adapter.ranks.get(module, adapter.rank)
        alpha = adapter.scale(module) * rank if adapter.rslora else adapter.alphas.get(module, adapter.alpha)
        tensors[f"{renamed}.alpha"] = torch.tensor(alpha)
    about = {"expert": adapter.expert, TARGETS: json.dumps(sorted(adapter.targets)), **adapter.about}
    save_atomically(path, tensors, {"format": "pt", "expert": adapter.expert, ABOUT: json.dumps(about)})


def read(path: Path, expert: ExpertName | None = None) -> Adapter:
    """Read a file that `write` wrote, or another tool's of the same form.

    Args:
        expert: which expert's it must be; a file that does not say is taken for this one's.

    Raises:
        InputError: for a damaged or foreign file, or the other expert's.
    """
    tensors, metadata = open_checked(path)
    weights, alphas = {}, {}
    for name, value in tensors.items():
        if not name.startswith(PREFIX):
            raise InputError(f"{path}: {name} does not start with {PREFIX}; not a ComfyUI LoRA")
        module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        try:
            if name.endswith(".alpha"):
                alphas[rename_module(module.removesuffix(".alpha"), ORIGINAL_TO_DIFFUSERS)] = float(value)
            else:
                weights[f"{rename_module(module, ORIGINAL_TO_DIFFUSERS)}.lora_{rest}"] = value.to(torch.float32)
        except (KeyError, ValueError, RuntimeError):
            raise InputError(f"{path}: {name} is no weight of Wan's blocks that is read here") from None
    ranks = {name.removesuffix(".lora_A.weight"): v.shape[0] for name, v in weights.items() if ".lora_A." in name}
    if not ranks:
        raise InputError(f"{path}: holds no LoRA weights")
    # ComfyUI applies B A as it is where there is no alpha.
    alphas = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
    about = about_of(path, metadata)
    found = checked_expert(path, about.pop("expert", metadata.get("expert")), expert)
    try:
        targets = [str(target) for target in json.loads(about.pop(TARGETS, "null")) or sorted(ranks)]
    except (ValueError, TypeError):
        raise InputError(f"{path}: its metadata ({TARGETS}) is no list") from None
    rank, alpha = (Counter(values.values()).most_common()[0][0] for values in (ranks, alphas))
    adapter = Adapter(
        expert=found,
        rank=int(rank),
        alpha=float(alpha),
        targets=tuple(targets),
        weights=weights,
        ranks={module: value for module, value in ranks.items() if value != rank},
        alphas={module: value for module, value in alphas.items() if value != alpha},
        about=about,
    )
    adapter.check(str(path))
    return adapter
