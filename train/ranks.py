"""Which of several processes this one is, for what is said before there is an accelerator, or without one."""

import os
import sys


def rank() -> int:
    """The number of this process among all that were launched, as the launcher has set it."""
    return int(os.environ.get("RANK", "0"))


def speaks() -> bool:
    """Whether this process says what is true of all: only the first one does."""
    return rank() == 0


def complain(fault: object) -> None:
    """One line on stderr about what ends this process. Each process has its own fault, and others than the first say
    which they are."""
    which = "" if speaks() else f"process {rank()}: "
    print(f"{which}error: {fault}", file=sys.stderr, flush=True)


def say_stopped(signal_name: object) -> None:
    """The last line of a run that a signal ends."""
    if speaks():
        print(f"stopped by {signal_name}; the same command goes on from here", file=sys.stderr, flush=True)
