"""What may differ from one expert to the other: the tables [lora], [flow], [optimizer], and [high], [low], [single]."""

from typing import Literal

from pydantic import Field

from wan_finetune.lora import LoraSettings
from wan_finetune.settings import Settings


class FlowSettings(Settings):
    """The noise levels that training draws, and what a miss costs."""

    shift: float = Field(5.0, gt=0)
    """Warp toward high noise: sigma = s*u / (1 + (s-1)*u). 1.0 leaves u uniform."""


class OptimizerSettings(Settings):
    """How gradients become updates."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` needs the bnb extra."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay on the LoRA weights."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of an expert's gradient."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""


class ExpertSettings(Settings):
    """One expert's training. [high.lora], [high.flow] and [high.optimizer] name what differs from the shared ones."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0, lt=1)
    """Peak learning rate."""
    lora: LoraSettings = LoraSettings()
    """What is injected into this expert."""
    flow: FlowSettings = FlowSettings()
    """Its noise levels."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Its optimizer."""


SHARED_TABLES = ("lora", "flow", "optimizer")
"""Tables that every expert takes over, and may change key by key."""
