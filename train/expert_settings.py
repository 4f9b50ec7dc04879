"""What may differ from one expert to the other: the tables [lora], [flow], [optimizer], and [high], [low], [single]."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from wan_finetune.lora import LoraSettings
from wan_finetune.settings import Settings

OPTIMIZERS = (
    "adamw",
    "adamw8bit",
    "paged_adamw8bit",
    "adafactor",
    "prodigy",
    "schedulefree",
    "muon",
)  # fmt: skip


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

    name: str = "adamw"
    """adamw, adamw8bit or paged_adamw8bit (bnb extra), adafactor, prodigy or schedulefree (optimizers extra), muon, or
    any `module:Class`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer's class, such as `{ momentum = 0.9 }`."""
    betas: tuple[float, float] | None = None
    """Decay of the running averages. Left out: (0.9, 0.99) where there are such; an optimizer without refuses them."""
    eps: float | None = Field(None, gt=0)
    """Added to the denominator. Left out: the optimizer's own."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay on the LoRA weights."""
    lora_plus_ratio: float = Field(1.0, gt=0)
    """LoRA+: the learning rate of lora_B is this many times that of lora_A (16 in its paper)."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """An average of the weights over the steps is exported instead of the last ones; 0 is off, 0.99 spans 100 steps."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of an expert's gradient."""
    warmup_steps: int = Field(50, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = "constant"
    """Learning rate after the warm-up, down to minimum_factor at the last step."""
    restarts: int = Field(1, ge=1)
    """How often `cosine_restarts` goes back to the peak."""
    power: float = Field(2.0, gt=0)
    """Of `polynomial`: (1 - progress) to this power."""
    minimum_factor: float = Field(0.0, ge=0, le=1)
    """What part of the peak the schedule ends at."""

    @field_validator("name")
    @classmethod
    def known_or_a_class(cls, value: str) -> str:
        if value not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError(f"known are {', '.join(OPTIMIZERS)}, and any module:Class")
        return value

    @field_validator("betas")
    @classmethod
    def betas_are_decays(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError("each must be at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def parts_fit_together(self) -> "OptimizerSettings":
        if self.name == "schedulefree":
            if self.schedule != "constant":
                raise ValueError('schedulefree averages instead of lowering the rate; it needs schedule = "constant"')
            if self.ema_decay:
                raise ValueError("schedulefree exports an average of its own; leave out ema_decay")
        if self.name == "prodigy" and self.lora_plus_ratio != 1:
            raise ValueError("prodigy finds one rate for all weights; leave out lora_plus_ratio")
        return self


class ExpertSettings(Settings):
    """One expert's training. [high.lora], [high.flow] and [high.optimizer] name what differs from the shared ones."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate. Of prodigy it is a factor on the rate that it finds, usually 1."""
    patience: int | None = Field(None, ge=0)
    """Validations without a new lowest loss after which its training ends; 0 for never. Left out:
    `validation.patience`."""
    lora: LoraSettings = LoraSettings()
    """What is injected into this expert."""
    flow: FlowSettings = FlowSettings()
    """Its noise levels."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Its optimizer."""

    @model_validator(mode="after")
    def rate_is_one(self) -> "ExpertSettings":
        named = self.optimizer.name in OPTIMIZERS and self.optimizer.name != "prodigy"
        if named and self.learning_rate >= 1:
            raise ValueError(f"learning_rate must be below 1 with {self.optimizer.name}, got {self.learning_rate:g}")
        if self.optimizer.name == "muon" and self.lora.dora:
            raise ValueError("muon takes matrices alone, and lora.dora learns vectors of magnitudes too")
        return self


SHARED_TABLES = ("lora", "flow", "optimizer")
"""Tables that every expert takes over, and may change key by key."""
