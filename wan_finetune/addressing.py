"""Addressed randomness: every draw is a function of where it is used, never of what was drawn before it.

An address is a tuple such as (seed, "high", "noise", step, position). Equal addresses give equal draws on every
machine and in every process; unequal ones give independent draws.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Address = int | str


def seed_at(*address: Address) -> int:
    """63 bits from the SHA-256 of the address."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in address)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_rng(*address: Address) -> np.random.Generator:
    """A NumPy generator for this address."""
    return np.random.default_rng(seed_at(*address))


def torch_rng(*address: Address) -> "torch.Generator":
    """A CPU generator for this address; draw on the CPU and move, so that devices agree."""
    import torch

    return torch.Generator().manual_seed(seed_at(*address))
