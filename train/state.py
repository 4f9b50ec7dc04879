"""What there is of an expert between steps, stretches and runs."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class ExpertState:
    """All that an expert's training carries from one step to the next, on the CPU."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    """Weights to export instead: a moving or a schedule-free average."""
    taken: dict[str, Tensor] = field(default_factory=dict)
    """The LoRA's start where it was taken out of the base."""
