"""Adapters of a few numbers, and files as other tools write them, by the rules of their writers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wan_finetune.adapters import Adapter
from wan_finetune.addressing import torch_rng
from wan_finetune.formats.names import DIFFUSERS_TO_FASTVIDEO, DIFFUSERS_TO_ORIGINAL
from wan_finetune.spec import LORA_TARGETS

BLOCKS, WIDTH, WIDE = 2, 24, 32
"""Of `tests.tiny_model`'s denoisers."""


def sizes(target: str) -> tuple[int, int]:
    """Inputs and outputs of a Linear of the tiny model."""
    return {"ffn.net.0.proj": (WIDTH, WIDE), "ffn.net.2": (WIDE, WIDTH)}.get(target, (WIDTH, WIDTH))


def make_weights(ranks: dict[str, int], *, dora: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of these modules: module -> rank."""
    weights = {}
    for module, rank in ranks.items():
        generator = torch_rng(seed, module)
        inputs, outputs = sizes(module.split(".", 2)[2])
        weights[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        weights[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
        if dora:
            weights[f"{module}.lora_magnitude_vector"] = torch.rand(outputs, generator=generator) + 0.5
    return weights


def make_adapter(
    expert: str = "high",
    targets: Iterable[str] = LORA_TARGETS,
    *,
    blocks: int = BLOCKS,
    rank: int = 4,
    seed: int = 0,
    **changes: Any,
) -> Adapter:
    """An adapter of the tiny model with alpha other than the rank."""
    targets = tuple(targets)
    ranks = {f"blocks.{block}.{target}": rank for block in range(blocks) for target in targets}
    ranks |= changes.get("ranks", {})
    weights = make_weights(ranks, dora=changes.get("dora", False), seed=seed)
    if blocks != BLOCKS:
        # An end of a name would reach every block of the model.
        targets = tuple(sorted(ranks))
    made: dict[str, Any] = {"expert": expert, "rank": rank, "alpha": 7.0, "targets": targets, "weights": weights}
    return Adapter(**{**made, **changes})


def update(adapter: Adapter, module: str) -> Tensor:
    """A module's change of weights, in float64."""
    a, b = (adapter.weights[f"{module}.lora_{half}.weight"].double() for half in "AB")
    return adapter.scale(module) * b @ a


def same_update(first: Adapter, second: Adapter, tolerance: float = 1e-6) -> bool:
    """Whether two adapters change the same modules by the same, and DoRA's magnitudes are equal."""
    if first.modules != second.modules or first.dora != second.dora:
        return False
    for name, value in first.weights.items():
        if name.endswith("magnitude_vector") and not torch.equal(value, second.weights[name]):
            return False
    return all(
        float((update(first, module) - update(second, module)).norm())
        <= tolerance * float(update(first, module).norm())
        for module in first.modules
    )


def renamed(adapter: Adapter, form: str, names: dict[str, str], halves: tuple[str, str], separator: str = ".") -> dict[str, Tensor]:  # fmt: skip # noqa: E501
    """An adapter's weights by another tool's keys: `form` has a place for the module and one for the half."""
    tensors = {}
    for name, value in adapter.weights.items():
        module, _, half = name.rpartition(".lora_")
        block, target = module.split(".", 2)[1:]
        theirs = separator.join(["blocks", block, names[target].replace(".", separator)])
        tensors[form.format(module=theirs, half=halves[half != "A.weight"])] = value.clone()
    return tensors


SELF = {name: name for name in LORA_TARGETS}
TOOLS: dict[str, tuple[str, dict[str, str], tuple[str, str], str]] = {
    # Tool -> its keys, its names of Linears, its names of the halves, what is between the parts of a name.
    "DiffSynth-Studio": ("{module}.{half}.default.weight", DIFFUSERS_TO_ORIGINAL, ("lora_A", "lora_B"), "."),
    "DiffSynth-Studio, prefix kept": (
        "pipe.dit.{module}.{half}.default.weight",
        DIFFUSERS_TO_ORIGINAL,
        ("lora_A", "lora_B"),
        ".",
    ),
    "VideoX-Fun": ("lora_unet__{module}.{half}.weight", DIFFUSERS_TO_ORIGINAL, ("lora_down", "lora_up"), "_"),
    "VideoX-Fun, PEFT": ("{module}.{half}.weight", DIFFUSERS_TO_ORIGINAL, ("lora_A", "lora_B"), "."),
    "ai-toolkit": ("diffusion_model.{module}.{half}.weight", DIFFUSERS_TO_ORIGINAL, ("lora_A", "lora_B"), "."),
    "diffusion-pipe": ("diffusion_model.{module}.{half}.weight", DIFFUSERS_TO_ORIGINAL, ("lora_A", "lora_B"), "."),
    "musubi-tuner": ("lora_unet_{module}.{half}.weight", DIFFUSERS_TO_ORIGINAL, ("lora_down", "lora_up"), "_"),
    "musubi-tuner, converted": (
        "diffusion_model.{module}.{half}.weight",
        DIFFUSERS_TO_ORIGINAL,
        ("lora_A", "lora_B"),
        ".",
    ),
    "FastVideo": ("{module}.{half}", DIFFUSERS_TO_FASTVIDEO, ("lora_A", "lora_B"), "."),
    "FastVideo, extracted": ("{module}.{half}.weight", SELF, ("lora_A", "lora_B"), "."),
    "finetrainers": ("transformer.{module}.{half}.weight", SELF, ("lora_A", "lora_B"), "."),
    "PEFT": ("base_model.model.{module}.{half}.weight", SELF, ("lora_A", "lora_B"), "."),
    "PEFT, compiled": ("base_model.model._orig_mod.{module}.{half}.weight", SELF, ("lora_A", "lora_B"), "."),
    "diffusers, compiled": ("transformer._orig_mod.{module}.{half}.weight", SELF, ("lora_A", "lora_B"), "."),
    "ComfyUI, lora_down": (
        "diffusion_model.{module}.{half}.weight",
        DIFFUSERS_TO_ORIGINAL,
        ("lora_down", "lora_up"),
        ".",
    ),
}


def as_written_by(tool: str, adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a file as this tool writes it, without alphas."""
    form, names, halves, separator = TOOLS[tool]
    return renamed(adapter, form, names, halves, separator)
