"""Where a LoRA starts: drawn, taken out of the base, or read from an adapter."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .addressing import seed_at, torch_rng
from .errors import InputError
from .experts import ExpertName
from .lora import TAKES_FROM_BASE, Initialisation, LoraSettings

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

ADAPTER = "default"
PLAIN = (torch.float32, torch.float16, torch.bfloat16)
DEQUANTISED_BY_PEFT = ("Params4bit", "Int8Params")
MOST_TARGETS = 12
"""Names in a message."""
PISSA = "pissa_niter_16"
"""PEFT's fast decomposition: the full one of an expert's 400 matrices takes hours."""


def require_base(model: nn.Module, modules: Iterable[str], settings: LoraSettings) -> None:
    """Whether the base's weights are of a kind that the settings can read, and write where they must.

    Raises:
        InputError: for a quantised base under a start that changes it, or under DoRA where its norm cannot be had.
    """
    for module in modules:
        weight = model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        if type(weight) is nn.Parameter and weight.dtype in PLAIN:
            continue
        kind = f"{type(weight).__name__} of {weight.dtype}"
        if settings.initialisation in TAKES_FROM_BASE:
            raise InputError(
                f'lora.initialisation = "{settings.initialisation}" changes the base, and this one is quantised '
                f'({module}: {kind}); use "kaiming", or memory.quantization = "none"'
            )
        if settings.dora and type(weight).__name__ not in DEQUANTISED_BY_PEFT:
            raise InputError(
                f"lora.dora needs the base's own weights, and this one is quantised in a way that PEFT cannot undo "
                f'({module}: {kind}); use memory.quantization = "none" or "nf4"'
            )


def draw(
    model: "WanTransformer3DModel",
    modules: Sequence[str],
    initialisation: Initialisation,
    expert: ExpertName,
    seed: int,
) -> dict[str, Tensor]:
    """Give fresh weights their start, a function of (seed, expert, module); returns what was taken out of the base.

    PEFT's own start is not kept: it is rounded to the precision of the base.
    """
    if initialisation in TAKES_FROM_BASE:
        return draw_from_base(model, modules, initialisation, expert, seed)
    for module in modules:
        layer: Any = model.get_submodule(module)
        a = layer.lora_A[ADAPTER].weight
        if a.is_meta:
            continue
        start, rng = torch.empty(a.shape), torch_rng(seed, expert, "lora", module)
        if initialisation == "gaussian":
            nn.init.normal_(start, std=1 / layer.r[ADAPTER], generator=rng)
        else:
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=rng)
        a.data.copy_(start)
        layer.lora_B[ADAPTER].weight.data.zero_()
    return {}


def draw_from_base(
    model: "WanTransformer3DModel",
    modules: Sequence[str],
    initialisation: Initialisation,
    expert: ExpertName,
    seed: int,
) -> dict[str, Tensor]:
    """PEFT's PiSSA or OLoRA in each module, one base matrix at a time."""
    taken = {}
    for module in modules:
        layer: Any = model.get_submodule(module)
        base = layer.get_base_layer()
        original = base.weight.data.clone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at(seed, expert, "lora", module))
            if initialisation == "pissa":
                layer.pissa_init(ADAPTER, PISSA)
            else:
                layer.olora_init(ADAPTER)
        base.weight.data = original
        for half in "AB":
            weight = getattr(layer, f"lora_{half}")[ADAPTER].weight
            weight.data = weight.data.to(torch.float32).contiguous()
            taken[f"{module}.lora_{half}.weight"] = weight.detach().to("cpu", copy=True)
    take_out(model, taken)
    return taken


def take_out(model: "WanTransformer3DModel", taken: Mapping[str, Tensor]) -> None:
    """Make each base matrix W0 - scale B0 A0, so that with the start added it is W0 again.

    In a base of bfloat16 the difference is rounded; that rounding is no part of the adapter.
    """
    for name in taken:
        module, _, half = name.rpartition(".lora_")
        if half != "A.weight":
            continue
        layer: Any = model.get_submodule(module)
        weight = layer.get_base_layer().weight
        a, b = (taken[f"{module}.lora_{part}.weight"].to(weight.device) for part in "AB")
        weight.data = (weight.data.float() - layer.scaling[ADAPTER] * b @ a).to(weight.dtype)


def require_start(settings: LoraSettings, expert: ExpertName) -> None:
    """Whether there is the adapter to start from, told before anything is prepared.

    Raises:
        InputError: it is missing, damaged, or another expert's.
    """
    from .formats.reading import read_expert

    if settings.start_from is not None:
        try:
            read_expert(settings.start_from, expert)
        except InputError as error:
            raise InputError(f"lora.start_from: {error}") from None


def weights_of(
    source: Path, settings: LoraSettings, plan: Mapping[str, tuple[int, float]], expert: ExpertName
) -> dict[str, Tensor]:
    """An adapter's weights for modules of this plan, at this plan's scale.

    Raises:
        InputError: when its modules, ranks or kind are others.
    """
    from .formats.reading import read_expert

    adapter = read_expert(source, expert)
    where = f"lora.start_from: {source}"
    if adapter.dora != settings.dora:
        kind = "a DoRA" if adapter.dora else "a plain LoRA"
        raise InputError(f"{where} is {kind}; set lora.dora = {str(adapter.dora).lower()}")
    if odd := sorted(set(adapter.modules) ^ set(plan)):
        has = "has no" if odd[0] in plan else "also has"
        targets = ", ".join(adapter.targets) if len(adapter.targets) <= MOST_TARGETS else "its modules"
        raise InputError(f"{where} {has} {odd[0]} ({len(odd)} modules differ); set lora.targets to {targets}")
    for module, (rank, _) in plan.items():
        found = adapter.ranks.get(module, adapter.rank)
        if found != rank:
            raise InputError(
                f"{where} has rank {found} in {module}, the configuration {rank}; "
                "set lora.rank (or lora.rank_pattern) to the adapter's, or start anew"
            )
    weights = dict(adapter.weights)
    for module, (rank, alpha) in plan.items():
        scale = alpha / (math.sqrt(rank) if settings.rslora else rank)
        # The update must be the same at the start, whatever alpha says now.
        if scale != adapter.scale(module):
            name = f"{module}.lora_B.weight"
            weights[name] = weights[name] * (adapter.scale(module) / scale)
    return weights
