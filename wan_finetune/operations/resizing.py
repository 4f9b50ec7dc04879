"""Lower ranks for a trained adapter."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS
from . import facts
from .factors import adapter_of, as_written, distance, first_of, highest_rank, norm, spectrum, update_of
from .sources import open_source, require_free, write_adapters

ChooseRank = Callable[[Tensor], int]
"""From a module's singular values [rank], falling, to how many are kept."""


@dataclass(frozen=True)
class Resized:
    """One expert's result."""

    adapter: Adapter
    error: float
    """Of the update, relative to what it was: Frobenius norms over all modules."""


def resize(source: Path, out: Path, *, rank: int | None = None, energy: float | None = None) -> list[str]:
    """Write an adapter of a lower rank; returns what to tell the user.

    Args:
        rank: the most that a module keeps.
        energy: or the share of each module's squared norm that is kept, so that every module has a rank of its own.

    Raises:
        InputError: for a rank that no module is above, or a share that is none.
    """
    require_free(out)
    adapters = list(open_source(source).adapters.values())
    if rank is not None:
        highest = max(highest_rank(adapter) for adapter in adapters)
        if not 1 <= rank < highest:
            allowed = f"1 to {highest - 1}" if highest > 1 else "none lower"
            raise InputError(f"--rank: {rank} is out of range; the adapter has rank {highest}, so {allowed} can be had")
        results = [resize_adapter(adapter, at_most(rank), f"resize to rank {rank}") for adapter in adapters]
    else:
        assert energy is not None
        if not 0 < energy < 1:
            raise InputError(f"--energy: {energy:g} is out of range; give a share between 0 and 1, such as 0.95")
        results = [resize_adapter(adapter, holding(energy), f"resize to energy {energy:g}") for adapter in adapters]
    lines = [str(path) for path in write_adapters(out, [result.adapter for result in results])]
    return lines + [described(result) for result in results]


def at_most(rank: int) -> ChooseRank:
    """The same rank for every module that has more."""
    return lambda values: min(rank, len(values))


def holding(energy: float) -> ChooseRank:
    """The lowest rank whose singular values hold this share of all their squares."""

    def choose(values: Tensor) -> int:
        held = torch.cumsum(values**2, 0) / (values**2).sum()
        return min(int((held < energy).sum()) + 1, len(values))

    return choose


def resize_adapter(adapter: Adapter, choose: ChooseRank, operation: str) -> Resized:
    """Each module's update at the rank that is chosen for it; of a DoRA that before its magnitudes, which stay."""
    products, squares = {}, {"error": 0.0, "all": 0.0}
    for module in adapter.modules:
        update = update_of(adapter, module)
        found = spectrum(update)
        rank = max(1, choose(found.s))
        products[module] = as_written(first_of(found, rank) if rank < update.a.shape[0] else update)
        squares["error"] += distance(products[module], update) ** 2
        squares["all"] += norm(update) ** 2
    result = adapter_of(adapter.expert, products, adapter.targets, facts.after(adapter.about, operation))
    magnitudes = {name: value for name, value in adapter.weights.items() if name.endswith(".lora_magnitude_vector")}
    result = replace(result, weights={**result.weights, **magnitudes}, dora=adapter.dora)
    return Resized(result, math.sqrt(squares["error"] / squares["all"]))


def described(result: Resized) -> str:
    """A result in a line."""
    adapter = result.adapter
    ranks = [adapter.ranks.get(module, adapter.rank) for module in adapter.modules]
    size = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    return (
        f"{EXPERTS[adapter.expert].title}: {size}, {sum(ranks) / len(ranks):.1f} on the average of {len(ranks)}; "
        f"relative error {result.error:.2g}, {1 - result.error**2:.2%} of the energy kept"
    )
