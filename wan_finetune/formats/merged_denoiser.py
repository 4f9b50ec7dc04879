"""One denoiser's full weights with an adapter merged in, in the base's own shards.

The sum is taken in fp32 and rounded once. What diffusers keeps in fp32 whatever it is asked for (time path, norms,
modulation) stays as the base has it, so that opening the result in bf16 gives what opening the base in bf16 would have.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS
from ..memory.loading import kept_in_fp32
from ..weight_files import StoredWeights, TensorHead, read_json
from .files import save_atomically

PATHS = ("_name_or_path", "name_or_path")
"""Keys of configurations that may hold a path of the machine where they were written."""


def require_fits(adapter: Adapter, stored: StoredWeights) -> None:
    """Whether the base has every module of the adapter at its size.

    Raises:
        InputError: naming the first that differs.
    """
    title = EXPERTS[adapter.expert].title
    for module in adapter.modules:
        head = stored.heads.get(f"{module}.weight")
        a, b = (adapter.weights[f"{module}.lora_{half}.weight"] for half in "AB")
        wanted = (b.shape[0], a.shape[1])
        if head is None:
            raise InputError(f"the adapter of {title} does not fit this base, which has no {module}")
        if head.shape != wanted:
            raise InputError(
                f"the adapter of {title} is of another size of base: {module} is {wanted}, the base has {head.shape}"
            )


def merged_weight(name: str, weight: Tensor, adapter: Adapter | None, strength: float) -> Tensor:
    """A tensor of the base with what the adapter does to it, fp32; as it is where the adapter does nothing.

    Of a DoRA each output's row gets its learnt magnitude, as PEFT's `DoraLinearVariant.merge_safe` has it.
    """
    module = name.removesuffix(".weight")
    if adapter is None or name == module or f"{module}.lora_A.weight" not in adapter.weights:
        return weight
    a, b = (adapter.weights[f"{module}.lora_{half}.weight"] for half in "AB")
    merged = (b @ a).mul_(adapter.scale(module) * strength).add_(weight.float())
    if adapter.dora:
        magnitude = adapter.weights[f"{module}.lora_magnitude_vector"]
        merged.mul_((magnitude / torch.linalg.norm(merged, dim=1))[:, None])
    return merged


def written_bytes(name: str, head: TensorHead, dtype: torch.dtype) -> int:
    """Size of a tensor in the result."""
    return head.num_bytes if kept_in_fp32(name) else head.num_values * dtype.itemsize


def write_denoiser(
    stored: StoredWeights, folder: Path, adapter: Adapter | None, strength: float, dtype: torch.dtype
) -> None:
    """Write one denoiser's shards and configuration; shards that are there are whole, and stay.

    Raises:
        InputError: when a value is too large for `dtype`, or is none in the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in dict.fromkeys(head.file for head in stored.heads.values()):
        if not (folder / file.name).is_file():
            write_shard(stored, file, folder / file.name, adapter, strength, dtype)
    total = sum(written_bytes(name, head, dtype) for name, head in stored.heads.items())
    for path in stored.folder.glob("*.safetensors.index.json"):
        index = read_json(path)
        write_json(folder / path.name, {**index, "metadata": {**index.get("metadata", {}), "total_size": total}})
    write_json(folder / "config.json", without_paths(read_json(stored.folder / "config.json")))


def write_shard(
    stored: StoredWeights, file: Path, target: Path, adapter: Adapter | None, strength: float, dtype: torch.dtype
) -> None:
    """Write one shard of the base, merged."""
    tensors = {}
    for name in (name for name, head in stored.heads.items() if head.file == file):
        base = stored.read(name)
        wanted = base.dtype if kept_in_fp32(name) else dtype
        # A copy: what is mapped from the base's file must not stay in memory.
        result = merged_weight(name, base, adapter, strength).to(wanted, copy=True)
        if not torch.isfinite(torch.stack(torch.aminmax(result))).all():
            raise InputError(f"{file}: {name} is not finite in {wanted}; use another --dtype, or fetch the base again")
        tensors[name] = result
    save_atomically(target, tensors, {"format": "pt"})


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it may be given away."""
    return {key: value for key, value in config.items() if key not in PATHS}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside the target, then rename, so that a link to another file is cut and not followed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
