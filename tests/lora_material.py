"""Adapters with random weights, without a model: as after some training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import adapter_material
from wan_finetune.adapters import Adapter
from wan_finetune.addressing import seed_at
from wan_finetune.experts import EXPERTS, ExpertName
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.spec import LORA_TARGETS


def make_adapter(
    expert: ExpertName, seed: int = 0, *, rank: int = 4, targets: Sequence[str] = LORA_TARGETS, **fields: Any
) -> Adapter:
    """An adapter of the tiny base; alpha is not the rank."""
    about = fields.pop("about", {"base": "tiny", "trigger": f"look {seed}"})
    return adapter_material.make_adapter(expert, targets, rank=rank, seed=seed_at(seed, expert), about=about, **fields)


def write(folder: Path, *adapters: Adapter) -> Path:
    """An adapter folder, for diffusers alone."""
    for adapter in adapters:
        diffusers_format.write(folder / EXPERTS[adapter.expert].file_name, adapter)
    return folder


def write_pair(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A folder with an adapter of each expert."""
    return write(folder, *(make_adapter(expert, seed, **fields) for expert in ("high", "low")))


def delta(adapter: Adapter, module: str) -> Tensor:
    """What a plain LoRA adds to a weight, float64; zero where it has no such module."""
    if f"{module}.lora_A.weight" not in adapter.weights:
        inputs, outputs = adapter_material.sizes(module.split(".", 2)[2])
        return torch.zeros(outputs, inputs, dtype=torch.float64)
    a, b = (adapter.weights[f"{module}.lora_{half}.weight"].double() for half in "AB")
    rank = a.shape[0]
    assert rank == adapter.ranks.get(module, adapter.rank)
    alpha = adapter.alphas.get(module, adapter.alpha)
    return alpha / (rank**0.5 if adapter.rslora else rank) * b @ a


def deltas(adapter: Adapter) -> Tensor:
    """All updates in one row, for norms over all modules."""
    return torch.cat([delta(adapter, module).flatten() for module in adapter.modules])


def as_expert(adapter: Adapter, expert: ExpertName) -> Adapter:
    """The same weights for another expert."""
    return replace(adapter, expert=expert)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Size of a difference beside what was wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def error_in(lines: Sequence[str], title: str) -> float:
    """The relative error that an operation tells of one expert."""
    line = next(line for line in lines if line.startswith(title) and "relative error" in line)
    return float(line.partition("relative error ")[2].removeprefix("against the sum ").split(",")[0].split(";")[0])
