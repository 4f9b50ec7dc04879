"""Arithmetic on products B A of low rank, in float64, without ever forming the matrix.

With QR of both factors, B = Q R and A' = P S, the product B A = Q (R S') P' has the singular values of R S', a square
of the rank's size. So a norm, a sum and the best product of a lower rank cost what a thin QR costs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import ExpertName
from ..lora import MAX_RANK, matches


class Factors(NamedTuple):
    """The matrix B A."""

    b: Tensor
    """[out, rank]"""
    a: Tensor
    """[rank, in]"""


class Spectrum(NamedTuple):
    """A product's singular values and vectors."""

    u: Tensor
    """[out, k]"""
    s: Tensor
    """[k], falling"""
    v: Tensor
    """[in, k]"""


def update_of(adapter: Adapter, module: str) -> Factors:
    """What an adapter adds to a module's weight, scale B A, the scale in B; float64."""
    a, b = (adapter.weights[f"{module}.lora_{half}.weight"].double() for half in "AB")
    return Factors(b * adapter.scale(module), a)


def highest_rank(adapter: Adapter) -> int:
    """The highest rank of any module."""
    return max(adapter.ranks.get(module, adapter.rank) for module in adapter.modules)


def total(parts: Iterable[Factors], weights: Iterable[float]) -> Factors:
    """The exact weighted sum of products, by joining them: its rank is the sum of their ranks."""
    weighted = [(part, weight) for part, weight in zip(parts, weights, strict=True)]
    return Factors(
        torch.cat([part.b * weight for part, weight in weighted], 1), torch.cat([part.a for part, _ in weighted])
    )


def spectrum(product: Factors) -> Spectrum:
    """Singular values and vectors of B A; as many as its factors can have."""
    q, r = torch.linalg.qr(product.b)
    p, s = torch.linalg.qr(product.a.T)
    u, values, vh = torch.linalg.svd(r @ s.T, full_matrices=False)
    return Spectrum(q @ u, values, p @ vh.T)


def norm(product: Factors) -> float:
    """Frobenius norm of B A, without the cancellation that a sum of squares has."""
    r = torch.linalg.qr(product.b, mode="r").R
    s = torch.linalg.qr(product.a.T, mode="r").R
    return float((r @ s.T).norm())


def distance(first: Factors, second: Factors) -> float:
    """Frobenius norm of the difference of two products, of any precision."""
    b = torch.cat([first.b.double(), -second.b.double()], 1)
    return norm(Factors(b, torch.cat([first.a.double(), second.a.double()])))


def as_written(product: Factors) -> Factors:
    """A product as files hold it, fp32."""
    return Factors(product.b.float().contiguous(), product.a.float().contiguous())


def first_of(found: Spectrum, rank: int) -> Factors:
    """The best product of this rank (Eckart-Young); the singular values go into both factors alike."""
    root = found.s[:rank].sqrt()
    return Factors(found.u[:, :rank] * root, (found.v[:, :rank] * root).T)


def adapter_of(
    expert: ExpertName, products: Mapping[str, Factors], targets: Iterable[str], about: Mapping[str, str]
) -> Adapter:
    """Products, fp32, as an adapter whose alpha is the rank, module by module, so that nothing is scaled.

    Args:
        targets: names or ends of names that reach these modules; those that reach none are left out.

    Raises:
        InputError: when a rank is higher than any adapter may have.
    """
    ranks = {module: product.a.shape[0] for module, product in products.items()}
    if (most := max(ranks.values())) > MAX_RANK:
        raise InputError(f"the result has rank {most} and {MAX_RANK} is the most; use --method svd with a --rank")
    rank = Counter(ranks.values()).most_common()[0][0]
    others = {module: value for module, value in ranks.items() if value != rank}
    weights = {}
    for module, product in products.items():
        weights[f"{module}.lora_A.weight"] = product.a
        weights[f"{module}.lora_B.weight"] = product.b
    return Adapter(
        expert=expert,
        rank=rank,
        alpha=float(rank),
        targets=fewest(targets, products),
        weights=weights,
        ranks=others,
        alphas={module: float(value) for module, value in others.items()},
        about=about,
    )


def fewest(targets: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Targets without those that reach nothing, and without whole names that an end of names reaches."""
    modules, targets = list(modules), sorted(set(targets))
    ends = [t for t in targets if not t.startswith("blocks.") and any(matches(t, module) for module in modules)]
    rest = {module for module in modules if not any(matches(end, module) for end in ends)}
    return tuple(sorted({*ends, *rest}))
