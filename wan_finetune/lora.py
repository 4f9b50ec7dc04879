"""What a LoRA is made of: the [lora] table."""

from pydantic import Field

from .settings import Settings
from .spec import LORA_TARGETS

MAX_RANK = 1024


class LoraSettings(Settings):
    """What is injected into an expert."""

    rank: int = Field(32, ge=1, le=MAX_RANK)
    """Rank of every LoRA pair."""
    alpha: float | None = Field(None, gt=0)
    """Scale of the update is alpha / rank. Left out: alpha = rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the LoRA's input."""
    targets: tuple[str, ...] = Field(LORA_TARGETS, min_length=1)
    """Linears that carry LoRA, by the end of their names."""

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)
