"""Optimizer and learning rate."""

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from wan_finetune.errors import InputError

from .expert_settings import OptimizerSettings


def make_optimizer(parameters: Iterable[Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of one expert's LoRA weights; its rate is set before each step."""
    betas, decay = (0.9, 0.99), settings.weight_decay
    if settings.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise InputError(
                'optimizer.name = "adamw8bit" needs bitsandbytes: pip install "wan-finetune[bnb]"'
            ) from None
        return AdamW8bit(parameters, lr=0.0, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=decay, fused=True)


def learning_rate(step: int, peak: float, steps: int, settings: OptimizerSettings) -> float:
    """The rate of optimizer step `step`, from 0; a pure function, so no scheduler can run ahead of the steps."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
