"""LoRA adapters of one expert: injecting them, taking their weights out, and saying whether they did anything."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .addressing import seed_at
from .errors import InputError
from .experts import ExpertName
from .lora import MAX_RANK, LoraSettings
from .spec import LORA_TARGETS

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

WEIGHT_NAME = re.compile(r"(blocks\.\d+\.[\w.]+)\.lora_([AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One expert's trained LoRA, apart from any model."""

    expert: ExpertName
    rank: int
    alpha: float
    targets: tuple[str, ...]
    weights: Mapping[str, Tensor]
    """`blocks.N.MODULE.lora_{A,B}.weight` -> fp32, [rank, in] and [out, rank]."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Allow-listed facts: trigger, base, shift, ..."""

    def check(self, source: str) -> None:
        """Whether the weights are complete and sane.

        Raises:
            InputError: naming `source`, the fault and the key.
        """
        if not self.weights:
            raise InputError(f"{source}: holds no LoRA weights")
        for name, value in self.weights.items():
            match = WEIGHT_NAME.fullmatch(name)
            if match is None:
                raise InputError(f"{source}: {name} is no weight of a Wan LoRA")
            if not value.is_floating_point() or value.ndim != 2:
                raise InputError(f"{source}: {name} is {value.dtype} {tuple(value.shape)}, not a matrix of floats")
            rank = value.shape[0] if match[2] == "A" else value.shape[1]
            if rank != self.rank or rank > MAX_RANK:
                raise InputError(f"{source}: {name} has rank {rank}, the adapter says {self.rank}")
            if f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight" not in self.weights:
                raise InputError(f"{source}: {name} stands without its other half")
            if not torch.isfinite(value).all():
                raise InputError(f"{source}: {name} has values that are not finite")
        if dead := dead_modules(self.weights):
            raise InputError(f"{source}: the LoRA does nothing in {len(dead)} modules, {dead[0]} the first")


def inject_lora(model: "WanTransformer3DModel", settings: LoraSettings, expert: ExpertName, seed: int) -> None:
    """Add fresh fp32 LoRA weights to a frozen expert; their start is a function of (seed, expert) alone.

    Raises:
        InputError: when a target matches no module.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    names = [name for name, _ in model.named_modules()]
    for target in settings.targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise InputError(f"lora.targets: {target!r} matches no module; known are {', '.join(LORA_TARGETS)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(seed, expert, "lora"))
        model.add_adapter(config)
    cast_training_params(model, torch.float32)


def lora_weights(model: "WanTransformer3DModel") -> dict[str, Tensor]:
    """A copy of the injected weights on the CPU, fp32, by their PEFT names."""
    from peft import get_peft_model_state_dict

    return {
        name: value.detach().to("cpu", torch.float32, copy=True)
        for name, value in get_peft_model_state_dict(model, adapter_name="default").items()
    }


def set_lora_weights(model: "WanTransformer3DModel", weights: Mapping[str, Tensor]) -> None:
    """Put weights back that `lora_weights` took out; every key must find its place."""
    from peft import set_peft_model_state_dict

    expected = lora_weights(model)
    if expected.keys() != weights.keys():
        odd = sorted(expected.keys() ^ weights.keys())
        raise InputError(f"the adapter's keys are not the model's: {len(odd)} differ, {odd[0]} the first")
    set_peft_model_state_dict(model, dict(weights), adapter_name="default")


def dead_modules(weights: Mapping[str, Tensor]) -> list[str]:
    """Modules whose lora_B is still zero, so that the adapter does nothing there."""
    return [name for name, value in weights.items() if ".lora_B." in name and not value.any()]


def update_norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of each module's weight update, alpha / rank * B A."""
    scale = adapter.alpha / adapter.rank
    return {
        name.removesuffix(".lora_A.weight"): scale
        * float(torch.linalg.matrix_norm(adapter.weights[name.replace("lora_A", "lora_B")] @ value))
        for name, value in adapter.weights.items()
        if ".lora_A." in name
    }
