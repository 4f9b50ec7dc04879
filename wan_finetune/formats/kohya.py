"""The kohya format, musubi-tuner's: original Wan names with underscores under `lora_unet_`, and an alpha for each."""

import torch
from torch import Tensor

from ..adapters import Adapter
from ..facts import metadata_of
from .assembling import assemble
from .comfyui import WAN, plain_alpha
from .format import FileFormat
from .names import DIFFUSERS_TO_ORIGINAL, flattened, nameless

PREFIX = "lora_unet_"
HALVES = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}


def refusal(adapter: Adapter) -> str | None:
    """Why an adapter cannot be written in this format, or None."""
    if odd := nameless(adapter.modules):
        return f"{odd} has no name in kohya's format; use --format diffusers or peft"
    if adapter.dora:
        return "a DoRA cannot be said in kohya's format, as musubi-tuner reads it; use --format diffusers or peft"
    return None


def caveat(adapter: Adapter) -> str | None:
    """Whether diffusers reads the file too: it wants all ten Linears of every block, from 0 on."""
    modules = set(adapter.modules)
    blocks = {int(module.split(".")[1]) for module in modules}
    if modules == {f"blocks.{block}.{name}" for block in range(len(blocks)) for name in DIFFUSERS_TO_ORIGINAL}:
        return None
    return (
        "musubi-tuner and ComfyUI read this file, diffusers does not: of kohya's format it wants all ten Linears of "
        "every block, and this adapter has some; for diffusers use --format diffusers"
    )


def encode(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """fp32 lora_down and lora_up with `.alpha`, which holds rsLoRA's root of the rank as well."""
    tensors = {}
    for name, value in adapter.weights.items():
        module, _, half = name.rpartition(".lora_")
        tensors[f"{PREFIX}{flattened(module)}.{HALVES[half]}"] = value
        tensors[f"{PREFIX}{flattened(module)}.alpha"] = torch.tensor(plain_alpha(adapter, module))
    return tensors, {**metadata_of(adapter, WAN), "expert": adapter.expert}


FORMAT = FileFormat(name="kohya", prefixes=(PREFIX,), encode=encode, decode=assemble, refusal=refusal, caveat=caveat)
write, read = FORMAT.write, FORMAT.read
