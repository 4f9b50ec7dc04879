"""An optimizer's state as files hold it: tensors by name, and the rest as JSON."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OWNED_BY_CONFIGURATION = ("weight_decay", "betas", "eps")
"""Hyperparameters that a resumed run takes from its configuration; `load_state_dict` would bring the old ones back."""


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict` as tensors on the CPU by name, and plain JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"groups": [], "values": {}}
    for number, group in enumerate(state["param_groups"]):
        held = {key: value for key, value in group.items() if isinstance(value, Tensor)}
        tensors |= {f"group.{number}.{key}": stored(value) for key, value in held.items()}
        plain["groups"].append({key: value for key, value in group.items() if key not in held})
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = stored(value)
            else:
                plain["values"][f"{index}.{key}"] = value
    return tensors, plain


def unflatten_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    groups = [dict(group) for group in plain["groups"]]
    for name, value in [*tensors.items(), *plain["values"].items()]:
        index, key = name.split(".", 1)
        if index == "group":
            number, key = key.split(".", 1)
            groups[int(number)][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    return {"state": dict(sorted(state.items())), "param_groups": groups}


@contextmanager
def configuration_stays(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A block that loads a saved state into a fresh optimizer, whose configured hyperparameters outlive it."""
    own_keys = set(OWNED_BY_CONFIGURATION)
    configured = [{key: group[key] for key in own_keys & group.keys()} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, configured, strict=True):
        group.update(own)


def stored(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()
