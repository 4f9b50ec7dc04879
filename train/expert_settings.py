"""What may differ from one expert to the other: the tables [lora], [flow], [optimizer], and [high], [low], [single]."""

from typing import Literal

from pydantic import Field

from wan_finetune.lora import LoraSettings
from wan_finetune.settings import Settings


class FlowSettings(Settings):
    """The noise levels that training draws, and what a miss costs."""

    shift: float = Field(5.0, gt=0)
    """Warp toward high noise: sigma = s*u / (1 + (s-1)*u). 1.0 leaves u as it is drawn."""
    density: Literal["uniform", "logit_normal", "mode", "beta", "schedule"] = "uniform"
    """How u is drawn inside the expert's share of it. `schedule`: only noise levels that the sampler visits, by
    sampling.steps and sampling.shift; then flow.shift has no part."""
    logit_mean: float = Field(0.0, ge=-5, le=5)
    """Of `logit_normal`."""
    logit_std: float = Field(1.0, gt=0, le=5)
    """Of `logit_normal`."""
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    """Of `mode`: positive for the middle, negative for the ends."""
    beta_a: float = Field(1.0, gt=0, le=50)
    """Of `beta`, Beta(a, b): a > b leans to noise."""
    beta_b: float = Field(1.0, gt=0, le=50)
    """Of `beta`."""
    weighting: Literal["none", "cosmap"] = "none"
    """Factor of the loss by noise level; `cosmap` lifts the middle (Esser et al. 2024)."""
    loss: Literal["mse", "huber"] = "mse"
    """`huber` counts large errors linearly: for sets with odd clips in them."""
    huber_delta: float = Field(1.0, gt=0)
    """Error from which `huber` is linear."""


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
