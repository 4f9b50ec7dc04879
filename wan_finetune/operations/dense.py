"""Whole matrices, and the best product of a low rank for one."""

import torch
from torch import Tensor

from .factors import Factors

EXACT_SIDE = 1024
"""Matrices whose shorter side is up to this get the full decomposition, in seconds at the most."""
OVERSAMPLING = 16
"""Directions that are looked for beside the wanted ones (Halko, Martinsson and Tropp 2011, section 4.3)."""
POWER_ITERATIONS = 6
"""q of them tell singular values apart as if their ratios were raised to the power 2q + 1 (the same, section 4.5)."""


def best_of_rank(matrix: Tensor, rank: int, seed: int) -> Factors:
    """The product of at most this rank that is nearest to a matrix [out, in], fp32.

    A large matrix is searched at random, with power iterations: exact when its rank is `rank` or lower, else within
    about a thousandth of the best. Directions that hold nothing but rounding are left out.

    Args:
        seed: of the search, so that equal matrices give equal bytes.
    """
    short = min(matrix.shape)
    if short <= EXACT_SIDE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, short), niter=POWER_ITERATIONS)
    floor = float(s[0]) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    kept = max(1, min(rank, int((s > floor).sum())))
    root = s[:kept].sqrt()
    return Factors(u[:, :kept] * root, (v[:, :kept] * root).T)


def distance(product: Factors, matrix: Tensor) -> float:
    """Frobenius norm of the difference between a product and a matrix."""
    return float((matrix - (product.b @ product.a).to(matrix.dtype)).norm())
