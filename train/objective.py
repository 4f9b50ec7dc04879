"""The loss of one micro-batch, every draw addressed by (seed, expert, step, position in the global batch)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wan_finetune.addressing import torch_rng
from wan_finetune.experts import ExpertName
from wan_finetune.flow import Interval, sample_sigma


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What is random about a micro-batch of B clips."""

    sigma: Tensor
    """Noise levels, [B] fp32, inside the expert's interval."""
    noise: Tensor
    """Standard normal, [B, C, F, H, W] fp32."""


def draw(
    *,
    seed: int,
    expert: ExpertName,
    step: int,
    positions: range,
    global_batch: int,
    interval: Interval,
    shift: float,
    shape: torch.Size,
) -> Draws:
    """Draw for these positions of the step's global batch; `shape` is one clip's [C, F, H, W].

    Uniform time is stratified over the global batch: position p has its own slice of it, in an order that changes
    with the step. Same distribution, less variance, whatever the number of processes.
    """
    slices = torch.randperm(global_batch, generator=torch_rng(seed, expert, "strata", step))
    sigma, noise = [], []
    for position in positions:
        inside = torch.rand((), generator=torch_rng(seed, expert, "sigma", step, position))
        sigma.append((slices[position] + inside) / global_batch)
        noise.append(torch.randn(shape, generator=torch_rng(seed, expert, "noise", step, position)))
    return Draws(sigma=sample_sigma(torch.stack(sigma), interval, shift), noise=torch.stack(noise))
