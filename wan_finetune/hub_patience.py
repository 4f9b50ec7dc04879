"""How long and how often the Hub is asked again, and what a failed request says about it."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Limits of one push."""

    tries: int = 5
    """Of the whole, whichever of its requests fails."""
    seconds: float = 120.0
    """Of pauses and failed requests together. Time in which a file's bytes move is not counted."""
    stall_seconds: float = 40.0
    """Without a byte in either direction, after which a request has failed."""
    answer_seconds: float = 60.0
    """From the first byte of an answer to its last: the answers are small, so a slower one drips."""
    xet_seconds: float = 30.0
    """For Xet, besides what its bytes take on the slowest connection."""
    first_pause_seconds: float = 1.0
    """Before the second try; doubled before each further one, and drawn between half and the whole of it."""
    longest_pause_seconds: float = 20.0


class Unsettled(Exception):
    """A request that failed in a way that may pass, or whose outcome is not known."""

    def __init__(self, what: str, *, idle_seconds: float = 0.0, retry_after_seconds: float | None = None) -> None:
        super().__init__(what)
        self.idle_seconds = idle_seconds
        """How long nothing moved before it failed."""
        self.retry_after_seconds = retry_after_seconds
        """What the Hub asks to wait."""


class Refused(Exception):
    """The Hub does not let this login do it: 401 or 403."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the Hub answers {status}")
        self.status = status


class PushError(Exception):
    """A push that failed for good: what happened and what to do about it."""


def persevere(
    attempt: Callable[[float], T],
    patience: Patience,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    draw: Callable[[], float] = random.random,
) -> T:
    """Call `attempt` until it succeeds, fails otherwise than by `Unsettled`, or patience is at its end.

    Args:
        attempt: is told how many seconds it may wait for nothing.

    Raises:
        PushError: when patience is at its end.
    """
    spent = 0.0
    for number in range(1, patience.tries + 1):
        try:
            return attempt(patience.seconds - spent)
        except Unsettled as fault:
            spent += fault.idle_seconds
            pause = pause_seconds(patience, number, fault.retry_after_seconds, draw)
            if number == patience.tries:
                raise PushError(f"{fault}; tried {number} times") from fault
            if spent + pause >= patience.seconds:
                asked = f", and the Hub asks to wait {pause:.0f} s" if fault.retry_after_seconds else ""
                raise PushError(
                    f"{fault}; tried {number} times{asked}, which is more than the {patience.seconds:.0f} s that "
                    "a push waits in all; try again later"
                ) from fault
            tell(f"{fault}; trying again in {pause:.1f} s ({number} of {patience.tries} tries)")
            sleep(pause)
            spent += pause
    raise AssertionError("the last try returns or raises")


def pause_seconds(patience: Patience, number: int, asked: float | None, draw: Callable[[], float]) -> float:
    """How long to wait after the try of this number: what the Hub asks for, or twice as long as the last time.

    It is drawn, so that many who failed together do not come back together; never below what the Hub asks for.
    """
    ceiling = min(patience.longest_pause_seconds, patience.first_pause_seconds * 2 ** (number - 1))
    drawn = ceiling * (0.5 + 0.5 * draw())
    return drawn if asked is None else asked + min(1.0, drawn)
