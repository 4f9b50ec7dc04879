"""What the result of an operation says of itself: no paths, no names of files."""

from collections.abc import Mapping, Sequence

from .. import __version__
from ..adapters import Adapter
from ..errors import InputError

MADE_BY = "made_by"
"""The operations that an adapter went through, in their order."""
KEPT_IF_EQUAL = ("training_shift",)
SAMPLED_WITH = ("sampling_shift", "fps")
"""Facts of which a pipeline can follow one only: those of the adapter with the largest weight."""


def after(about: Mapping[str, str], operation: str) -> dict[str, str]:
    """An adapter's facts after an operation on it alone."""
    earlier = [about[MADE_BY]] if MADE_BY in about else []
    return {**about, MADE_BY: "; ".join([*earlier, operation]), "toolkit": f"wan-finetune {__version__}"}


def title_of(adapter: Adapter, number: int) -> str:
    """What a merge calls one of its parts."""
    return adapter.about.get("trigger") or f"adapter {number}"


def merged(
    adapters: Sequence[Adapter], titles: Sequence[str], weights: Sequence[float], method: str
) -> tuple[dict[str, str], list[str]]:
    """Facts of a merged adapter, and warnings about those in which its parts differ.

    The base must be the same. Triggers are joined with commas in the order of the parts, as a prompt would say them.

    Raises:
        InputError: when the parts were trained for different bases.
    """
    bases = distinct(adapters, "base")
    if len(bases) > 1:
        raise InputError(
            f"the adapters are of different bases, {' and '.join(map(repr, bases))}; they cannot be merged"
        )
    about, warnings = {}, []
    if bases:
        about["base"] = bases[0]
    triggers = [trigger for trigger in distinct(adapters, "trigger") if trigger]
    if distinct(adapters, "trigger"):
        about["trigger"] = ", ".join(triggers)
    if len(triggers) > 1:
        warnings.append(f"their triggers differ; a prompt now says {about['trigger']!r}, or one of them")
    for fact in KEPT_IF_EQUAL:
        values = distinct(adapters, fact)
        if len(values) == 1:
            about[fact] = values[0]
    heaviest = sorted(zip(weights, adapters, strict=True), key=lambda pair: -abs(pair[0]))
    for fact in SAMPLED_WITH:
        values = [adapter.about[fact] for _, adapter in heaviest if fact in adapter.about]
        if values:
            about[fact] = values[0]
        if len(set(values)) > 1:
            warnings.append(
                f"they were previewed with {fact} {' and '.join(distinct(adapters, fact))}; {values[0]}, which the "
                "largest weight has, is recorded"
            )
    parts = " + ".join(f"{title} x {weight:g}" for title, weight in zip(titles, weights, strict=True))
    return after(about, f"merge {method} of {parts}"), warnings


def distinct(adapters: Sequence[Adapter], fact: str) -> list[str]:
    """The different values of a fact, in the adapters' order."""
    return list(dict.fromkeys(adapter.about[fact] for adapter in adapters if fact in adapter.about))
