"""Whose turn it is: the order in which two independent experts are trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from wan_finetune.experts import ExpertName


@dataclass(frozen=True, slots=True)
class Stretch:
    """One expert trained from step `start` up to `stop`, without the other."""

    expert: ExpertName
    start: int
    stop: int
    round: int
    """Number of the round that it belongs to, from 0."""


def stretches(
    steps: Mapping[ExpertName, int], order: Literal["rounds", "sequence"], round_steps: int
) -> Iterator[Stretch]:
    """All stretches of a run, in order.

    The experts share nothing, so every order gives the same adapters; rounds show both of them growing.
    """
    if order == "sequence":
        for name, total in steps.items():
            yield Stretch(name, 0, total, 0)
        return
    for number in range(-(-max(steps.values()) // round_steps)):
        start = number * round_steps
        for name, total in steps.items():
            if start < total:
                yield Stretch(name, start, min(start + round_steps, total), number)
