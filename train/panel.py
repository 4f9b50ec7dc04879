"""The live panel of a training: one bar, and one line of figures below it."""

from collections import deque
from collections.abc import Mapping
from statistics import fmean

from wan_finetune.experts import ExpertName

from .records import StepRecord
from .validation import HeldOutLoss

SMOOTHED_STEPS = 20
"""Losses in the mean that is shown: a single one says little, its noise level is another each time."""


class Figures:
    """What the panel says of a run, step by step.

    Args:
        steps: of each expert, to be done in all.
        done: of each expert, before this process began.
    """

    def __init__(self, steps: Mapping[ExpertName, int], done: Mapping[ExpertName, int]) -> None:
        self.steps, self.done = dict(steps), dict(done)
        self.losses: deque[float] = deque(maxlen=SMOOTHED_STEPS)
        self.seconds: deque[float] = deque(maxlen=SMOOTHED_STEPS)

    def begin(self) -> None:
        """Another expert's turn: its losses and times are its own."""
        self.losses.clear()
        self.seconds.clear()

    def add(self, record: StepRecord) -> None:
        self.losses.append(record.loss)
        self.seconds.append(record.seconds)
        self.done[record.expert] = record.step

    def note(self) -> str:
        """For the bar: the loss and the pace."""
        return f"loss {fmean(self.losses):.4f}  {fmean(self.seconds):.2f} s/step"

    def details(self, record: StepRecord, held_out: HeldOutLoss | None) -> str:
        """The line below it."""
        parts = [
            f"lr {record.learning_rate:.1e}",
            f"gradient {record.gradient_norm:.3g}",
            f"{record.tokens_per_second:,.0f} tokens/s",
            f"waiting for data {record.stall_seconds / record.seconds:.0%}",
            f"{record.memory_gib:.1f} GiB",
        ]
        if held_out is not None:
            parts.append(f"held-out {held_out.loss:.4f} (base {held_out.base_loss:.4f})")
        done, total = sum(self.done.values()), sum(self.steps.values())
        parts.append(f"run {done / total:.0%}, {duration((total - done) * fmean(self.seconds))} left")
        return "  |  ".join(parts)


def duration(seconds: float) -> str:
    """As a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
