"""Names of the ways to merge."""

from typing import Literal, get_args

Method = Literal[
    "linear",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
METHODS: tuple[str, ...] = get_args(Method)
OF_UPDATES = "_svd"
"""Ends the name of a pruning method that works on whole updates instead of their factors."""


def pruning_function(method: str) -> str | None:
    """The function of `peft.utils.merge_utils` that a method calls, None of one that prunes nothing."""
    return None if method in ("linear", "svd") else method.removesuffix(OF_UPDATES)
