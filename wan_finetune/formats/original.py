"""Bare original Wan names, as DiffSynth-Studio, VideoX-Fun and FastVideo read them.

Of these, only some look for an alpha, and under different names. So the scale is multiplied into lora_B, and each
module's alpha is its rank, which is what all of them take when there is none.
"""

from torch import Tensor

from ..adapters import Adapter
from ..facts import metadata_of
from .assembling import assemble
from .comfyui import WAN
from .format import FileFormat
from .names import nameless, original


def refusal(adapter: Adapter) -> str | None:
    """Why an adapter cannot be written in this format, or None."""
    if odd := nameless(adapter.modules):
        return f"{odd} has no name in the original code; use --format diffusers or peft"
    if adapter.dora:
        return "a DoRA cannot be said in bare original names, which no program reads; use --format diffusers or peft"
    return None


def encode(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """fp32 lora_A and lora_B without alphas; to the bit as trained where the scale is a power of two."""
    folded = without_scale(adapter)
    tensors = {}
    for name, value in folded.weights.items():
        module, _, half = name.rpartition(".lora_")
        tensors[f"{original(module)}.lora_{half}"] = value
    return tensors, {**metadata_of(folded, WAN), "expert": adapter.expert}


def without_scale(adapter: Adapter) -> Adapter:
    """The same update with every module's alpha at its rank."""
    weights = {
        name: value * adapter.scale(name.rpartition(".lora_")[0]) if ".lora_B." in name else value
        for name, value in adapter.weights.items()
    }
    return Adapter(
        expert=adapter.expert,
        rank=adapter.rank,
        alpha=float(adapter.rank),
        targets=adapter.targets,
        weights=weights,
        ranks=adapter.ranks,
        alphas={module: float(rank) for module, rank in adapter.ranks.items()},
        about=adapter.about,
    )


FORMAT = FileFormat(name="original", prefixes=("blocks.", "pipe.dit."), encode=encode, decode=assemble, refusal=refusal)
write, read = FORMAT.write, FORMAT.read
