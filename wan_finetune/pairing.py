"""Two runs, one of each expert, become one adapter folder."""

from collections.abc import Sequence
from pathlib import Path

from .adapters import Adapter
from .errors import InputError
from .experts import EXPERTS, HIGH, LOW
from .formats.reading import read_expert
from .operations.facts import SAMPLED_WITH
from .operations.sources import write_adapters
from .pipeline import read_adapters

SHARED = ("base", "trigger")
"""Facts in which two halves of one adapter must agree."""


def pair(high: Path, low: Path, out: Path) -> list[Path]:
    """Write a high-noise and a low-noise adapter into one folder, for diffusers and for ComfyUI.

    Args:
        high: a file, an adapter folder, or a run's folder.
        low: the same; both may be one folder.
        out: where they go; must hold no adapter yet.

    Raises:
        InputError: when one is missing or the other expert's, or they are of different bases or triggers, or
            `out` cannot take them; nothing is written then.
    """
    adapters = [read_expert(high, HIGH.name), read_expert(low, LOW.name)]
    for fact in SHARED:
        first, second = (adapter.about.get(fact) for adapter in adapters)
        if first is not None and second is not None and first != second:
            raise InputError(
                f"{high} and {low} are no pair: their {fact} is {first!r} and {second!r}; "
                "train both experts for the same one"
            )
    sizes = [module_sizes(adapter) for adapter in adapters]
    if odd := sorted(module for module in sizes[0].keys() & sizes[1].keys() if sizes[0][module] != sizes[1][module]):
        raise InputError(f"{high} and {low} are no pair: {odd[0]} has another size, so their bases differ")
    return write_adapters(out, adapters)


def module_sizes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each module, which both experts of a base have alike."""
    weights = adapter.weights
    return {
        module: (weights[f"{module}.lora_A.weight"].shape[1], weights[f"{module}.lora_B.weight"].shape[0])
        for module in adapter.modules
    }


def what_went_in(folder: Path, sources: Sequence[Path]) -> list[str]:
    """One line an adapter, and a warning where they were made to be sampled differently."""
    adapters = read_adapters(folder)
    lines = [f"{describe(adapter)}; from {source}" for adapter, source in zip(adapters, sources, strict=True)]
    for fact in SAMPLED_WITH:
        values = [adapter.about.get(fact) for adapter in adapters]
        if len({value for value in values if value is not None}) > 1:
            lines.append(f"warning: they were previewed with {fact} {' and '.join(map(str, values))}")
    return lines


def describe(adapter: Adapter) -> str:
    """An adapter in a line: expert, size, and the facts that pairs share."""
    facts = ", ".join(f"{fact} {adapter.about.get(fact, 'not said') or 'none'}" for fact in (*SHARED, "steps"))
    modules = f"{len(adapter.modules)} modules"
    return f"{EXPERTS[adapter.expert].title}: rank {adapter.rank}, alpha {adapter.alpha:g}, {modules}; {facts}"
