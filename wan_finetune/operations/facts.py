"""What the result of an operation says of itself: no paths, no names of files."""

import re
from collections.abc import Mapping, Sequence

from .. import __version__
from ..adapters import Adapter
from ..errors import InputError

OPERATION = "operation"
"""The operations that an adapter went through, in their order."""
MOST_LETTERS = 300
"""Of the operations; the latest are kept."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,:=()-]{0,39}")
"""A trigger that can stand for its adapter among the operations."""
KEPT_IF_EQUAL = ("base_revision", "boundary", "training_shift", "resolution", "frames", "licence")
SAMPLED_WITH = ("sampling_shift", "fps")
"""Facts of which a pipeline can follow one only: those of the adapter with the largest weight."""
MOST_TRIGGER = 200
"""Letters of a trigger."""


def after(about: Mapping[str, str], operation: str) -> dict[str, str]:
    """An adapter's facts after an operation on it alone."""
    operations = [*about.get(OPERATION, "").split("; "), operation] if about.get(OPERATION) else [operation]
    while len("; ".join(operations)) > MOST_LETTERS and len(operations) > 1:
        del operations[0]
    told = "; ".join(operations)[:MOST_LETTERS]
    return {**about, OPERATION: told, "toolkit": f"wan-finetune {__version__}"}


def title_of(adapter: Adapter, number: int) -> str:
    """What a merge calls one of its parts."""
    trigger = adapter.about.get("trigger", "")
    return trigger if NAME.fullmatch(trigger) else f"adapter {number}"


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
    about = {"base": bases[0]} if bases else {}
    heaviest = [adapter for _, adapter in sorted(zip(weights, adapters, strict=True), key=lambda pair: -abs(pair[0]))]
    trigger, warnings = joined_trigger(adapters, heaviest)
    if trigger is not None:
        about["trigger"] = trigger
    for fact in KEPT_IF_EQUAL:
        values = distinct(adapters, fact)
        if len(values) == 1:
            about[fact] = values[0]
        elif fact == "licence" and values:
            warnings.append(f"their licences differ ({', '.join(values)}); none is recorded, and all of them hold")
    for fact in SAMPLED_WITH:
        values = distinct(heaviest, fact)
        if values:
            about[fact] = values[0]
        if len(values) > 1:
            warnings.append(
                f"they were previewed with {fact} {' and '.join(distinct(adapters, fact))}; {values[0]}, which the "
                "largest weight has, is recorded"
            )
    parts = " + ".join(f"{title} x {weight:g}" for title, weight in zip(titles, weights, strict=True))
    return after(about, f"merge {method} of {parts}"), warnings


def joined_trigger(adapters: Sequence[Adapter], heaviest: Sequence[Adapter]) -> tuple[str | None, list[str]]:
    """The trigger of a merged adapter, None where no part speaks of one, and what to say of it.

    Args:
        heaviest: the same adapters, by falling weight.
    """
    said = distinct(adapters, "trigger")
    triggers = [trigger for trigger in said if trigger]
    whole = ", ".join(triggers)
    if len(whole) > MOST_TRIGGER:
        first = next(trigger for trigger in distinct(heaviest, "trigger") if trigger)
        return first, [
            f"their triggers are too long to be joined; {first!r}, which the largest weight has, is recorded"
        ]
    warnings = [f"their triggers differ; a prompt now says {whole!r}, or one of them"] if len(triggers) > 1 else []
    return (whole if said else None), warnings


def distinct(adapters: Sequence[Adapter], fact: str) -> list[str]:
    """The different values of a fact, in the adapters' order."""
    return list(dict.fromkeys(adapter.about[fact] for adapter in adapters if fact in adapter.about))
