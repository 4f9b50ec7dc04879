"""Flow matching as Wan trains it, restricted to one expert's noise levels.

    x_t = (1 - sigma) x_0 + sigma noise,   target = noise - x_0,   t = 1000 sigma
    sigma = s u / (1 + (s - 1) u),         the shift s of Esser et al. 2024 (arXiv:2403.03206); `density` draws u

Everything here is fp32: in bf16 the high expert's range has some 32 distinct values.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .spec import NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True, slots=True)
class Interval:
    """Noise levels sigma of one expert: low <= sigma <= high, within [0, 1]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"interval must satisfy 0 <= low < high <= 1, got {self.low}, {self.high}")


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Uniform time u in [0, 1] -> sigma in [0, 1], any shape."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_time`."""
    return sigma / (shift - (shift - 1.0) * sigma)


def clamp_to(interval: Interval, sigma: Tensor) -> Tensor:
    """Noise levels, fp32, moved by rounding errors at most, so that each has its timestep inside the interval."""
    return sigma.clamp(*ends(interval))


@lru_cache
def ends(interval: Interval) -> tuple[float, float]:
    """The smallest and the largest fp32 noise level whose timestep is inside; asked for in every step.

    The boundary itself belongs to the high expert, as in `WanPipeline`.
    """
    top = torch.tensor(1.0)
    if interval.high < 1.0:
        top = torch.nextafter(first_sigma_at(interval.high * NUM_TRAIN_TIMESTEPS), torch.tensor(0.0))
    return float(first_sigma_at(interval.low * NUM_TRAIN_TIMESTEPS)), float(top)


def first_sigma_at(t: float) -> Tensor:
    """The smallest fp32 noise level whose fp32 timestep reaches `t`, so that both sides of a boundary agree on it."""
    sigma, zero, one = torch.tensor(t / NUM_TRAIN_TIMESTEPS, dtype=torch.float32), torch.tensor(0.0), torch.tensor(1.0)
    while sigma > 0 and timestep(torch.nextafter(sigma, zero)) >= t:
        sigma = torch.nextafter(sigma, zero)
    while timestep(sigma) < t:
        sigma = torch.nextafter(sigma, one)
    return sigma


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t for latents and noise [B, C, F, H, W] at noise levels [B]."""
    s = sigma.view(-1, 1, 1, 1, 1)
    return (1.0 - s) * latents + s * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """The regression target, the shape of both."""
    return noise - latents


def timestep(sigma: Tensor) -> Tensor:
    """The t that the denoiser is given, fp32 in [0, 1000]."""
    return sigma * NUM_TRAIN_TIMESTEPS
