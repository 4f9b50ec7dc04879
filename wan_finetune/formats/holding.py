"""What a file holds: every key given its meaning, every value of the right kind."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..experts import ExpertName
from .files import Opened
from .keys import Meaning, meaning, shown, why_not


@dataclass
class Held:
    """What a file holds of one expert, by diffusers' module names."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """`blocks.N.MODULE.lora_{A,B}.weight` and `.lora_magnitude_vector` -> fp32."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Module -> alpha, where the file has it as a tensor."""
    experts: set[ExpertName] = field(default_factory=set)
    """Whose halves the file marks, of a file with both."""

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module -> rank, by lora_A; asked when all is in."""
        return {n.removesuffix(".lora_A.weight"): v.shape[0] for n, v in self.weights.items() if ".lora_A." in n}


def hold(opened: Opened, expert: ExpertName | None) -> Held:
    """Give every key of a file its meaning.

    Args:
        expert: whose half is taken of a file with both.

    Raises:
        InputError: for a key without one, two of the same, a value of the wrong kind, or a file for both experts of
            which none is named.
    """
    path, came_from = opened.path, dict[str, str]()
    meanings = meanings_of(opened)
    found = Held(experts=marked_experts(meanings.values()))
    if len(found.experts) > 1 and expert not in found.experts:
        raise InputError(f"{path}: holds both experts' adapters; say which with --expert high or --expert low")
    for key, said in meanings.items():
        if len(found.experts) > 1 and (said.expert or "high") != expert:
            continue
        name = f"{said.module}.alpha" if said.part == "alpha" else f"{said.module}.lora_{said.part}"
        if name in came_from:
            raise InputError(
                f"{path}: {shown(came_from[name])} and {shown(key)} are both {name}; the file holds two adapters, "
                "save them apart"
            )
        came_from[name] = key
        value = opened.tensors[key]
        if said.part == "alpha":
            found.alphas[said.module] = alpha_of(path, key, value)
            continue
        if not value.is_floating_point() or value.ndim != (1 if said.part == "magnitude_vector" else 2):
            raise InputError(
                f"{path}: {shown(key)} is {value.dtype} {tuple(value.shape)}, not a matrix of floats; save it again "
                "as float32 or bfloat16"
            )
        found.weights[name] = value.to(torch.float32)
    if not found.ranks:
        raise InputError(f"{path}: holds no LoRA weights; nothing was trained, or it was saved before it was")
    if lone := sorted(found.alphas.keys() - found.ranks.keys()):
        raise InputError(f"{path}: has an alpha for {lone[0]} and no LoRA; save the adapter again")
    return found


def meanings_of(opened: Opened) -> dict[str, Meaning]:
    """What each key holds. Raises InputError for the first that holds nothing known."""
    meanings = {}
    for key in opened.tensors:
        said = meaning(key)
        if said is None:
            raise InputError(f"{opened.path}: {shown(key)} cannot be matched: {why_not(key)}")
        meanings[key] = said
    return meanings


def marked_experts(meanings: Iterable[Meaning]) -> set[ExpertName]:
    """Whose halves the keys name; none of most files."""
    marks = {said.expert for said in meanings}
    # Beside a `transformer_2.` diffusers' own name of the high-noise one has no number.
    return {mark or "high" for mark in marks} if "low" in marks else {mark for mark in marks if mark}


def alpha_of(path: Path, key: str, value: Tensor) -> float:
    """A module's alpha from its tensor, in the shortest number of that precision: 0.1 is stored as 0.10000000149."""
    if value.numel() != 1 or value.is_complex() or value.dtype is torch.bool:
        raise InputError(f"{path}: {shown(key)} is {value.dtype} {tuple(value.shape)}, not one number")
    alpha = float(str(np.float32(value.item()))) if value.dtype is torch.float32 else float(value.item())
    if not 0 < alpha < float("inf"):
        raise InputError(
            f"{path}: {shown(key)} is {alpha:g}; programs differ in what they make of that. Set it to what it was "
            "trained with"
        )
    return alpha
