"""The ComfyUI format: original Wan names under `diffusion_model.`, with an alpha for each module."""

import torch
from torch import Tensor

from ..adapters import Adapter
from ..facts import metadata_of
from .assembling import assemble
from .format import FileFormat
from .names import nameless, original

PREFIX = "diffusion_model."
WAN = "https://github.com/Wan-Video/Wan2.2"
"""The code whose module names these are."""


def refusal(adapter: Adapter) -> str | None:
    """Why an adapter cannot be written in this format, or None."""
    if odd := nameless(adapter.modules):
        return f"{odd} has no name in ComfyUI's format; use --format diffusers or peft"
    if adapter.dora:
        return (
            "a DoRA is not written for ComfyUI: its dora_scale makes diffusers' reader of that format fail; "
            "use --format diffusers or peft"
        )
    return None


def encode(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """fp32 lora_A and lora_B with `.alpha`.

    The format knows alpha / rank alone, so rsLoRA's root of the rank goes into alpha.
    """
    tensors = {}
    for name, value in adapter.weights.items():
        module, _, half = name.rpartition(".lora_")
        tensors[f"{PREFIX}{original(module)}.lora_{half}"] = value
        tensors[f"{PREFIX}{original(module)}.alpha"] = torch.tensor(plain_alpha(adapter, module))
    return tensors, {**metadata_of(adapter, WAN), "expert": adapter.expert}


def plain_alpha(adapter: Adapter, module: str) -> float:
    """The alpha that a module has where the scale is alpha / rank."""
    if adapter.rslora:
        return adapter.scale(module) * adapter.ranks.get(module, adapter.rank)
    return adapter.alphas.get(module, adapter.alpha)


FORMAT = FileFormat(name="comfyui", prefixes=(PREFIX,), encode=encode, decode=assemble, refusal=refusal)
write, read = FORMAT.write, FORMAT.read
