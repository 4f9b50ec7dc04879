"""Merging by pruning, TIES and DARE: PEFT's functions (`peft.utils.merge_utils`), one module at a time.

PEFT's `add_weighted_adapter` has each of them twice. Under the plain name it works on the factors: A with A, B with B,
each weighted by the root of its weight, so that the product has terms between the adapters that no sum has. With `_svd`
it works on the whole updates, as the papers do, and brings the result to a rank.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapters import Adapter
from ..addressing import seed_at
from ..errors import InputError
from ..experts import ExpertName
from .dense import best_of_rank
from .factors import Factors, update_of
from .methods import OF_UPDATES, pruning_function


def merge_module(
    method: str,
    module: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    density: float,
    rank: int,
    seed: int,
    expert: ExpertName,
) -> Factors:
    """The merged update of one module that all these adapters have.

    What is dropped at random is a function of (seed, expert, module), whatever was merged before.

    Raises:
        InputError: when factors of different ranks would have to be added.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(seed, expert, "merge", module))
        if method.endswith(OF_UPDATES):
            updates = [product.b.float() @ product.a.float() for product in (update_of(a, module) for a in adapters)]
            mixed = pruned(method, updates, weights, density)
            return best_of_rank(mixed, rank, seed_at(seed, expert, "svd", module))
        return merge_factors(method, module, adapters, weights, density)


def merge_factors(
    method: str, module: str, adapters: Sequence[Adapter], weights: Sequence[float], density: float
) -> Factors:
    """PEFT's merge of A with A and of B with B; a negative weight turns the sign of A."""
    halves: Mapping[str, list[Tensor]] = {
        half: [adapter.weights[f"{module}.lora_{half}.weight"] for adapter in adapters] for half in "AB"
    }
    if len(ranks := sorted({a.shape[0] for a in halves["A"]})) > 1:
        raise InputError(
            f"--method {method} adds factors of one rank, and {module} has {' and '.join(map(str, ranks))}; "
            f'use "{method}{OF_UPDATES}", or "resize" first'
        )
    scaled = [weight * adapter.scale(module) for weight, adapter in zip(weights, adapters, strict=True)]
    a = pruned(method, halves["A"], [math.copysign(math.sqrt(abs(weight)), weight) for weight in scaled], density)
    b = pruned(method, halves["B"], [math.sqrt(abs(weight)) for weight in scaled], density)
    return Factors(b, a)


def pruned(method: str, tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """What PEFT's function for a method makes of tensors of one shape."""
    from peft.utils import merge_utils

    function = getattr(merge_utils, pruning_function(method) or "")
    result: Tensor = function(list(tensors), torch.tensor(weights), density)
    return result
