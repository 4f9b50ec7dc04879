"""Several adapters become one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from ..lora import Rank
from ..pairing import module_sizes
from ..settings import Settings
from . import facts
from .factors import Factors, adapter_of, as_written, distance, first_of, highest_rank, norm, spectrum, total, update_of
from .methods import Method, pruning_function
from .pruning import merge_module
from .sources import Source, open_source, require_free, write_adapters

CANCELLED = 1e-6
"""A sum this small beside its parts is rounding."""


class MergeSettings(Settings):
    """How adapters are merged."""

    weights: tuple[float, ...]
    """One for each adapter; negative takes it away."""
    method: Method = "linear"
    """`linear`: the exact sum, its rank the sum of the ranks. `svd`: the nearest to it of `rank`. The others prune."""
    rank: Rank | None = None
    """Of the methods that end in svd; left out: the highest of the adapters'."""
    density: float | None = Field(None, gt=0, lt=1)
    """Share of the values that pruning keeps."""
    seed: int = 0
    """Of what the `dare` methods drop."""

    @model_validator(mode="after")
    def parts_fit_together(self) -> "MergeSettings":
        if odd := [weight for weight in self.weights if weight == 0 or not math.isfinite(weight)]:
            raise ValueError(f"a weight of {odd[0]:g} merges nothing; leave that adapter out")
        prunes = pruning_function(self.method) is not None
        if prunes and self.density is None:
            raise ValueError(f'method "{self.method}" prunes; say with density which share is kept, such as 0.5')
        if not prunes and self.density is not None:
            raise ValueError(f'method "{self.method}" keeps everything; leave density out')
        if self.rank is not None and not self.method.endswith("svd"):
            raise ValueError(f'method "{self.method}" has the rank that comes out; rank is for "svd" and "..._svd"')
        return self


@dataclass(frozen=True)
class Merged:
    """One expert's result."""

    adapter: Adapter
    error: float
    """Of the update against the weighted sum, relative to the sum: Frobenius norms over all modules."""
    warnings: tuple[str, ...]


def merge(paths: Sequence[Path], out: Path, settings: MergeSettings) -> list[str]:
    """Merge adapters, files or folders, into one adapter folder; returns what to tell the user.

    Raises:
        InputError: when they cannot be merged, or `out` holds an adapter.
    """
    if len(paths) < 2:
        raise InputError('merge takes two adapters or more; "scale" changes one alone')
    if len(paths) != len(settings.weights):
        given = len(settings.weights)
        raise InputError(f"--weights: {given} for {len(paths)} adapters; give one for each, in their order")
    require_free(out)
    sources = [open_source(path) for path in paths]
    require_alike(sources)
    results = [merge_expert(sources, expert, settings) for expert in experts_of(sources)]
    lines = [str(path) for path in write_adapters(out, [result.adapter for result in results])]
    for result in results:
        lines.append(described(result, settings.method))
        absent = [str(source.path) for source in sources if result.adapter.expert not in source.adapters]
        lines += [f"warning: {path} has no adapter of {EXPERTS[result.adapter.expert].title}" for path in absent]
    return lines + [f"warning: {each}" for each in dict.fromkeys(w for result in results for w in result.warnings)]


def experts_of(sources: Sequence[Source]) -> list[ExpertName]:
    """The experts that any of the sources has an adapter of."""
    return [name for name in EXPERTS if any(name in source.adapters for source in sources)]


def require_alike(sources: Sequence[Source]) -> None:
    """Whether the sources can be merged at all.

    Raises:
        InputError: no expert in common, DoRA, or bases of different sizes or numbers of experts.
    """
    experts = experts_of(sources)
    if not any(sum(name in source.adapters for source in sources) > 1 for name in experts):
        has = "; ".join(f"{source.path} has {', '.join(source.adapters)}" for source in sources)
        raise InputError(f'no adapters in common: {has}; to join two experts\' adapters into one folder use "pair"')
    if "single" in experts and len(experts) > 1:
        raise InputError("some of the adapters are for a base with one denoiser and some for a base with two")
    sizes: dict[str, tuple[int, int]] = {}
    for source in sources:
        for adapter in source.adapters.values():
            if adapter.dora:
                raise InputError(
                    f"{source.path}: is a DoRA, whose magnitudes do not add; merge it into the base instead "
                    '("export --format merged"), or extract a plain LoRA from that'
                )
            for module, size in module_sizes(adapter).items():
                if sizes.setdefault(module, size) != size:
                    raise InputError(
                        f"{source.path}: {module} is {size[0]} to {size[1]} and in another adapter "
                        f"{sizes[module][0]} to {sizes[module][1]}; their bases differ"
                    )


def merge_expert(sources: Sequence[Source], expert: ExpertName, settings: MergeSettings) -> Merged:
    """Merge one expert's adapters, module by module; a source that lacks a module adds nothing to it."""
    held = [(number, source.adapters[expert]) for number, source in enumerate(sources) if expert in source.adapters]
    adapters, weights = [adapter for _, adapter in held], [settings.weights[number] for number, _ in held]
    titles = [facts.title_of(adapter, number + 1) for number, adapter in held]
    about, warnings = facts.merged(adapters, titles, weights, settings.method)
    rank = settings.rank or max(highest_rank(adapter) for adapter in adapters)
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    warnings += [
        f"{title} has {len(adapter.modules)} of the {len(modules)} modules of {EXPERTS[expert].title}"
        for title, adapter in zip(titles, adapters, strict=True)
        if len(adapter.modules) < len(modules)
    ]
    products, squares = {}, {"error": 0.0, "sum": 0.0}
    for module in modules:
        having = [(a, w) for a, w in zip(adapters, weights, strict=True) if f"{module}.lora_A.weight" in a.weights]
        exact = total([update_of(adapter, module) for adapter, _ in having], [weight for _, weight in having])
        length = norm(exact)
        parts = sum(abs(weight) * norm(update_of(adapter, module)) for adapter, weight in having)
        if length <= CANCELLED * parts:
            raise InputError(f"the weights cancel each other out in {module} of {EXPERTS[expert].title}; change them")
        products[module] = as_written(merge_module_by(settings, expert, module, having, exact, rank))
        squares["error"] += distance(products[module], exact) ** 2
        squares["sum"] += length**2
    targets = [target for adapter in adapters for target in adapter.targets]
    adapter = adapter_of(expert, products, targets, about)
    return Merged(adapter, math.sqrt(squares["error"] / squares["sum"]), tuple(warnings))


def merge_module_by(
    settings: MergeSettings,
    expert: ExpertName,
    module: str,
    having: Sequence[tuple[Adapter, float]],
    exact: Factors,
    rank: int,
) -> Factors:
    """One module's update, merged by the chosen method.

    Args:
        having: the adapters that have the module, and their weights.
        exact: the weighted sum of their updates.
    """
    if settings.method == "linear":
        return exact
    if settings.method == "svd":
        found = spectrum(exact)
        return first_of(found, min(rank, len(found.s)))
    assert settings.density is not None
    return merge_module(
        settings.method,
        module,
        [adapter for adapter, _ in having],
        [weight for _, weight in having],
        density=settings.density,
        rank=rank,
        seed=settings.seed,
        expert=expert,
    )


def described(result: Merged, method: str) -> str:
    """A result in a line."""
    adapter = result.adapter
    ranks = sorted({adapter.rank, *adapter.ranks.values()})
    size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return (
        f"{EXPERTS[adapter.expert].title}: {method}, {size}, {len(adapter.modules)} modules; "
        f"relative error against the sum {result.error:.2g}"
    )
