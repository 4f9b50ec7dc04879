"""A part of a pipeline that is to be written: its weights under new names, and its configuration."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from .tensor_files import TensorFacts
from .weights import Stored, Weights

LISTED_NAMES = 3
"""Names in a message about many."""


@dataclass(frozen=True, slots=True)
class Part:
    """One folder of a diffusers pipeline."""

    folder: str
    class_name: str
    library: str
    weights_name: str
    """File name of the weights, without `.safetensors`."""
    config: Mapping[str, Any]
    weights: Weights
    names: Mapping[str, str]
    """New name of each original one."""
    kept_fp32: frozenset[str] = frozenset()
    """Modules that the library loads in fp32, whatever it is asked for: they are written so."""

    def wanted_dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """What a weight is written in, by its original name; None keeps what it has, unpacked from fp8 to bf16."""
        stored: Stored = self.weights.tensors[name]
        if dtype is None:
            return torch.bfloat16 if stored.scale or stored.facts.dtype.itemsize == 1 else stored.facts.dtype
        return torch.float32 if self.kept_fp32 & set(self.names[name].split(".")) else dtype

    def target_facts(self, name: str, dtype: torch.dtype | None) -> TensorFacts:
        """Type and shape of a weight as it will be written; its place is not known yet."""
        return TensorFacts(self.wanted_dtype(name, dtype), self.weights.shape(name), 0)


def require_exact(part: Part, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """The renamed weights are those of the library's model: each once, none missing, none besides, every shape.

    Raises:
        InputError: names the first that is not so.
    """
    source = part.weights.files[0].parent if len(part.weights.files) > 1 else part.weights.files[0]
    known = {name for name, new in part.names.items() if new in wanted}
    if unexpected := part.weights.tensors.keys() - known:
        raise InputError(f"{source}: {listed(unexpected)} {'is' if len(unexpected) == 1 else 'are'} not of this model")
    origins: dict[str, str] = {}
    for name, new in part.names.items():
        if new in origins:
            raise InputError(f"{source}: {origins[new]} and {name} are the same weight")
        origins[new] = name
    if missing := wanted.keys() - origins.keys():
        raise InputError(f"{source}: the weight{'s' if len(missing) > 1 else ''} for {listed(missing)} not there")
    for new, shape in wanted.items():
        has = part.weights.shape(origins[new])
        if has != shape:
            raise InputError(f"{source}: {origins[new]} has the shape {list(has)}, the model asks {list(shape)}")


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - LISTED_NAMES} more" if len(ordered) > LISTED_NAMES else ""
    return ", ".join(ordered[:LISTED_NAMES]) + more


def meta_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
