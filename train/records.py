"""Figures of a run as JSON lines, each with its expert and step, that a resumed run can cut back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_finetune.experts import ExpertName


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one optimizer step reports."""

    expert: ExpertName
    step: int
    """Steps done, this one included."""
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    tokens_per_second: float
    stall_seconds: float
    """Of these seconds, how long the step waited for its data."""
    memory_gib: float
    """The most that has been in use so far: of the GPU, or of this process on a CPU."""


class JsonLines:
    """One file of records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines; the last may be cut when a run was killed."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def forget_after(self, steps: Mapping[ExpertName, int]) -> None:
        """Drop lines of steps beyond these: a resumed run writes them again."""
        if self.path.is_file():
            kept = [line for line in self.lines() if line["step"] <= steps.get(line["expert"], 0)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.path)
