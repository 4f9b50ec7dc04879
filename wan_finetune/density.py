"""How training time u is distributed before the flow shift, and the same distribution inside one expert's interval.

A density is a cumulative distribution on [0, 1] and its inverse, the quantile function. Uniform draws become draws
inside an interval by walking the quantiles between the interval's own: nothing is rejected, and draws that are spread
evenly stay so. Logit-normal and mode are those of Esser et al. 2024 (arXiv:2403.03206).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .flow import Interval, clamp_to, shift_time, unshift_sigma


class Density(Protocol):
    """A distribution over u in [0, 1], where u = 1 is pure noise."""

    def cumulative(self, u: Tensor) -> Tensor:
        """P(U <= u), fp64, any shape."""

    def quantile(self, p: Tensor) -> Tensor:
        """The inverse of `cumulative`, fp64."""

    def __hash__(self) -> int:
        """Densities are values: equal parameters, equal hash."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every u alike."""

    def cumulative(self, u: Tensor) -> Tensor:
        return u

    def quantile(self, p: Tensor) -> Tensor:
        return p


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """logit(u) is normal: more of the middle."""

    mean: float
    std: float

    def cumulative(self, u: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(u) - self.mean) / self.std)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(p))


@dataclass(frozen=True, slots=True)
class Mode:
    """Heavy around u = 1/2 for a positive scale, around the ends for a negative one; all u keep some share."""

    scale: float

    def cumulative(self, u: Tensor) -> Tensor:
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def quantile(self, p: Tensor) -> Tensor:
        v = 1.0 - p
        return 1.0 - v - self.scale * (torch.cos(torch.pi / 2 * v).square() - 1.0 + v)


@dataclass(frozen=True, slots=True)
class Beta:
    """Beta(a, b): a > b leans to noise, a < b to the clip."""

    a: float
    b: float

    def cumulative(self, u: Tensor) -> Tensor:
        from scipy.special import betainc

        return torch.from_numpy(np.asarray(betainc(self.a, self.b, u.numpy())))

    def quantile(self, p: Tensor) -> Tensor:
        from scipy.special import betaincinv

        return torch.from_numpy(np.asarray(betaincinv(self.a, self.b, p.numpy())))


def sample_sigma(v: Tensor, interval: Interval, shift: float, density: Density) -> Tensor:
    """Uniform draws v, [B] in [0, 1), -> noise levels of this density inside the interval, [B] fp32.

    Time is restricted before the shift: this is exactly the shifted density given the expert, and nothing is
    rejected. Rounding never leaves the interval: the boundary belongs to the high expert, as in `WanPipeline`.
    """
    low, high = quantile_edges(interval, shift, density)
    u = density.quantile(low + (high - low) * v.double())
    return clamp_to(interval, shift_time(u, shift).float())


@lru_cache
def quantile_edges(interval: Interval, shift: float, density: Density) -> tuple[float, float]:
    """Where an interval of noise levels begins and ends in the density's quantiles; asked for in every step."""
    sigma = torch.tensor([interval.low, interval.high], dtype=torch.float64)
    low, high = density.cumulative(unshift_sigma(sigma, shift)).tolist()
    return low, high


def sample_schedule(v: Tensor, levels: Tensor) -> Tensor:
    """Uniform draws v, [B] in [0, 1), -> one of a sampler's noise levels [N] each, [B], all equally likely."""
    return levels[(v.double() * len(levels)).long().clamp_max(len(levels) - 1)]
