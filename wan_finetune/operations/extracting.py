"""A LoRA out of a model that was fine-tuned as a whole: what it changed, in each Linear's best few directions."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Adapter
from ..addressing import seed_at
from ..errors import InputError
from ..experts import EXPERTS, Expert, ExpertName, base_folder, boundary_ratio
from ..lora import MAX_RANK
from ..memory.loading import is_block_matrix
from ..weight_files import StoredWeights, TensorHead, stored_weights
from . import facts
from .dense import best_of_rank, distance
from .factors import Factors, adapter_of, as_written
from .sources import require_free, write_adapters

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WORST = 5
"""Modules that are named in the report."""


@dataclass
class LeftOut:
    """Tensors of one kind that differ and that a LoRA cannot hold."""

    tensors: int = 0
    values: int = 0
    difference: float = 0.0
    """Sum of squares."""
    size: float = 0.0
    """Sum of squares of the base's."""


@dataclass(frozen=True)
class Extracted:
    """One expert's result."""

    expert: Expert
    adapter: Adapter | None
    """None when no Linear differs."""
    energies: dict[str, float] = field(default_factory=dict)
    """Module -> share of its difference's squared norm that the adapter holds."""
    energy: float = 0.0
    """The same over all modules."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)


def extract(
    base: str, tuned: str, out: Path, *, rank: int, experts: Sequence[ExpertName] = (), trigger: str = ""
) -> list[str]:
    """Write the difference of two models as an adapter folder; returns what to tell the user.

    Args:
        base: a diffusers folder, or a repository of the Hub.
        tuned: the same, with the same sizes.
        rank: the most that a module gets.
        experts: which; all that the base has when left out.
        trigger: the word that the model was tuned with, to be recorded.

    Raises:
        InputError: when they are no models of one size, are quantised, or do not differ.
    """
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"--rank: {rank} is out of range; 1 to {MAX_RANK} can be had")
    require_free(out)
    boundary = boundary_ratio(base_folder(base))
    names = tuple(experts) or (("single",) if boundary is None else ("high", "low"))
    for name in names:
        EXPERTS[name].interval(boundary)
    components = [EXPERTS[name].component for name in names]
    folders = [base_folder(model, components) for model in (base, tuned)]
    pairs = [[stored_weights(folder / component) for folder in folders] for component in components]
    for before, after in pairs:
        require_alike(before, after)
    about = {"base": Path(base).name if Path(base).is_dir() else base, **({"trigger": trigger} if trigger else {})}
    about = facts.after(about, f"extract at rank {rank}")
    results = [
        extract_expert(EXPERTS[name], *pair, rank=rank, about=about) for name, pair in zip(names, pairs, strict=True)
    ]
    adapters = [result.adapter for result in results if result.adapter is not None]
    if not adapters:
        changed = "only in what a LoRA cannot hold" if any(result.left_out for result in results) else "nowhere"
        raise InputError(f"{tuned} differs from {base} {changed}; there is nothing to extract")
    lines = [str(path) for path in write_adapters(out, adapters)]
    return lines + [line for result in results for line in described(result)]


def require_alike(before: StoredWeights, after: StoredWeights) -> None:
    """Whether two models have the same tensors of the same sizes.

    Raises:
        InputError: naming the first that differs.
    """
    if odd := sorted(before.heads.keys() ^ after.heads.keys()):
        has = before.folder if odd[0] in before.heads else after.folder
        raise InputError(f"only {has} has {odd[0]} ({len(odd)} tensors differ); the models are of different kinds")
    for name, head in before.heads.items():
        if head.shape != after.heads[name].shape:
            raise InputError(
                f"{after.folder}: is a base of another size: {name} is {after.heads[name].shape}, "
                f"and in {before.folder} {head.shape}"
            )


def extract_expert(
    expert: Expert, before: StoredWeights, after: StoredWeights, *, rank: int, about: dict[str, str]
) -> Extracted:
    """One expert's difference, tensor by tensor."""
    products: dict[str, Factors] = {}
    energies: dict[str, float] = {}
    squares = {"all": 0.0, "lost": 0.0}
    left_out: dict[str, LeftOut] = defaultdict(LeftOut)
    for name, old, difference in differences(before, after):
        if not is_block_matrix(name, difference):
            found = left_out[re.sub(r"\.\d+\.", ".*.", name)]
            found.tensors += 1
            found.values += difference.numel()
            found.difference += square(difference)
            found.size += square(old)
            continue
        module = name.removesuffix(".weight")
        product = as_written(best_of_rank(difference, rank, seed_at(0, expert.name, "extract", module)))
        whole, lost = square(difference), distance(product, difference) ** 2
        products[module], energies[module] = product, max(0.0, 1 - lost / whole)
        squares["all"] += whole
        squares["lost"] += lost
    if not products:
        return Extracted(expert, None, left_out=dict(left_out))
    adapter = adapter_of(expert.name, products, targets_of(before.heads, products), about)
    return Extracted(expert, adapter, energies, max(0.0, 1 - squares["lost"] / squares["all"]), dict(left_out))


def square(tensor: Tensor) -> float:
    """Sum of a tensor's squares; in float64, where no difference is too small to have one."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def differences(before: StoredWeights, after: StoredWeights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, old value and difference of each tensor that differs, fp32.

    Files of two precisions differ everywhere by rounding: a tensor that is the same in the coarser one is the same.
    """
    for name, head in before.heads.items():
        old, new = before.read(name), after.read(name)
        coarser = coarser_of(head, after.heads[name])
        if torch.equal(old.to(coarser), new.to(coarser)):
            continue
        if not new.isfinite().all():
            raise InputError(f"{after.heads[name].file}: {name} has values that are not finite")
        yield name, old.float(), new.float() - old.float()


def coarser_of(first: TensorHead, second: TensorHead) -> torch.dtype:
    """Of two dtypes the one with the fewer digits."""
    return max((DTYPES[head.dtype] for head in (first, second)), key=lambda dtype: torch.finfo(dtype).eps)


def targets_of(names: Iterable[str], modules: Mapping[str, Factors]) -> list[str]:
    """Ends of names where all blocks have the module, whole names elsewhere."""
    every: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if name.startswith("blocks.") and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            every[module.split(".", 2)[2]].add(module)
    ends = {module.split(".", 2)[2] for module in modules}
    complete = {end for end in ends if every[end] <= modules.keys()}
    return sorted({*complete, *(module for module in modules if module.split(".", 2)[2] not in complete)})


def described(result: Extracted) -> list[str]:
    """What was kept, where the least was, and what could not be kept."""
    title, adapter = result.expert.title, result.adapter
    if adapter is None:
        return [f"{title}: no Linear of a block differs; it gets no adapter", *not_held(result)]
    worst = sorted(result.energies, key=lambda module: result.energies[module])[:WORST]
    least = ", ".join(f"{module} {result.energies[module]:.1%}" for module in worst)
    return [
        f"{title}: {len(adapter.modules)} modules, {result.energy:.2%} of the difference's energy kept",
        f"  the least in {least}",
        *not_held(result),
    ]


def not_held(result: Extracted) -> list[str]:
    """Warnings about what differs and is in no LoRA."""
    return [
        f"warning: {result.expert.title}: {name} differs and no LoRA can hold it: {found.tensors} tensors, "
        f"{found.values:,} values, changed by {percent(found)} of their norm"
        for name, found in sorted(result.left_out.items(), key=lambda item: -item[1].difference)
    ]


def percent(found: LeftOut) -> str:
    """The change of these tensors beside their size."""
    return f"{math.sqrt(found.difference / found.size):.2%}" if found.size else "all"
