"""The files of weights that will be written: which weight goes where, before one is read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import InputError
from .parts import Part
from .tensor_files import TensorFacts

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a part."""

    file_name: str
    tensors: dict[str, str]
    """Original name of each new one, in the order of the source."""
    facts: dict[str, TensorFacts]
    """Of each new name; the position is that in this shard."""

    @property
    def num_bytes(self) -> int:
        """Of the numbers, without the table."""
        return sum(facts.num_bytes for facts in self.facts.values())


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `2GiB`.

    Raises:
        InputError: no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b)?", text.strip(), re.IGNORECASE)
    unit = (found[2] or "").upper() if found else ""
    if not found or unit not in {*UNITS, "B"} or not (size := int(float(found[1]) * UNITS.get(unit, 1))):
        raise InputError(f"--max-shard-size: {text!r} is no size; give one such as 5GB or 500MB")
    return size


def plan_shards(part: Part, dtype: torch.dtype | None, max_bytes: int) -> list[Shard]:
    """Fill files up to `max_bytes`, in the order in which the source is read; a larger weight has a file of its own.

    Args:
        dtype: of the weights that are not kept in fp32; None keeps each one's own.
    """
    groups = list(grouped(part, dtype, max_bytes))
    shards = []
    for number, names in enumerate(groups, start=1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        facts = {}
        position = 0
        # Wide types first: behind an odd number of narrow ones a reader would find them out of line.
        names.sort(key=lambda name: -part.wanted_dtype(name, dtype).itemsize)
        for name in names:
            target = part.target_facts(name, dtype)
            facts[part.names[name]] = TensorFacts(target.dtype, target.shape, position)
            position += target.num_bytes
        tensors = {part.names[name]: name for name in names}
        shards.append(Shard(f"{part.weights_name}{suffix}.safetensors", tensors, facts))
    return shards


def grouped(part: Part, dtype: torch.dtype | None, max_bytes: int) -> Iterator[list[str]]:
    """Original names, a list a file."""
    places = {path: number for number, path in enumerate(part.weights.files)}
    stored = part.weights.tensors
    group: list[str] = []
    size = 0
    for name in sorted(stored, key=lambda name: (places[stored[name].file.path], stored[name].facts.position)):
        num_bytes = part.target_facts(name, dtype).num_bytes
        if group and size + num_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


def index_of(shards: list[Shard]) -> dict[str, object]:
    """The index that diffusers and transformers read where there is more than one file."""
    places = {name: shard.file_name for shard in shards for name in shard.facts}
    return {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": dict(sorted(places.items())),
    }
