"""Optimizer, learning rate, and what of them goes into a checkpoint."""

import contextlib
import importlib
import inspect
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from wan_finetune.errors import InputError

from .expert_settings import OptimizerSettings

CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim:AdamW", "torch", {"fused": True}),
    "adamw8bit": ("bitsandbytes.optim:AdamW8bit", ".[bnb]", {}),
    "paged_adamw8bit": ("bitsandbytes.optim:PagedAdamW8bit", ".[bnb]", {}),
    # torch's own Adafactor scales its steps by the weights, so lora_B, which starts at zero, would hardly move.
    "adafactor": (
        "transformers.optimization:Adafactor",
        "transformers",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": (
        "prodigyopt:Prodigy",
        ".[optimizers]",
        {"use_bias_correction": True, "safeguard_warmup": True},
    ),
    "schedulefree": ("schedulefree:AdamWScheduleFree", ".[optimizers]", {}),
    # Updates of the size of AdamW's, so that its learning rates hold.
    "muon": ("torch.optim:Muon", "torch>=2.9", {"adjust_lr_fn": "match_rms_adamw"}),
}
"""Name -> class, what to install for it, and arguments that suit LoRA."""

BETAS = (0.9, 0.99)
NESTED = "/"
"""Joins the keys of a state's tables in tables, which a checkpoint does not hold."""


def make_optimizer(
    parameters: Iterable[tuple[str, Parameter]], settings: OptimizerSettings, peak: float
) -> torch.optim.Optimizer:
    """The optimizer of one expert's named LoRA weights; its rate is set before each step (`set_rate`).

    Raises:
        InputError: when its package is missing, or it takes no such argument.
    """
    optimizer_class = find_class(settings.name)
    accepted = inspect.signature(optimizer_class).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    arguments: dict[str, Any] = {"lr": peak, **CLASSES.get(settings.name, ("", "", {}))[2]}
    if "betas" in accepted:
        arguments["betas"] = BETAS
    if "weight_decay" in accepted:
        arguments["weight_decay"] = settings.weight_decay
    given = {"betas": settings.betas, "eps": settings.eps}
    given = {name: value for name, value in given.items() if value is not None} | settings.arguments
    if taken := sorted({"params", "lr"} & settings.arguments.keys()):
        raise InputError(f"optimizer.arguments: {taken[0]} is not set here; the rate is each expert's learning_rate")
    if unknown := sorted(name for name in given if name not in accepted and not open_ended):
        known = ", ".join(name for name in accepted if name not in ("self", "params", "lr"))
        raise InputError(f"optimizer.{unknown[0]}: {settings.name} takes no such argument; it takes {known}")
    if settings.name == "adafactor" and settings.eps is not None:
        given["eps"] = (settings.eps, 1e-3)
    try:
        # One prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer: torch.optim.Optimizer = optimizer_class(
                parameter_groups(parameters, settings), **arguments | given
            )
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer.arguments: {settings.name} refuses them: {error}") from error
    switch(optimizer, "train")
    return optimizer


def find_class(name: str) -> Any:
    """The class of a named optimizer, or of `module:Class`.

    Raises:
        InputError: when it cannot be had.
    """
    place, package, _ = CLASSES.get(name, (name, "", {}))
    module, _, class_name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        remedy = f'pip install "{package}"' if package else f"there is no {class_name} in {module}"
        raise InputError(f'optimizer.name = "{name}" cannot be had: {remedy} ({error})') from None


def parameter_groups(parameters: Iterable[tuple[str, Parameter]], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """One group, or with LoRA+ two, each with its factor on the learning rate."""
    named = list(parameters)
    if settings.lora_plus_ratio == 1:
        return [{"params": [p for _, p in named], "rate_factor": 1.0}]
    fast = [".lora_B." in name for name, _ in named]
    return [
        {"params": [p for (_, p), is_b in zip(named, fast, strict=True) if not is_b], "rate_factor": 1.0},
        {
            "params": [p for (_, p), is_b in zip(named, fast, strict=True) if is_b],
            "rate_factor": settings.lora_plus_ratio,
        },
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make `rate` the learning rate of the coming step, each group by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def learning_rate(step: int, peak: float, steps: int, settings: OptimizerSettings) -> float:
    """The rate of optimizer step `step`, from 0; a pure function, so no scheduler can run ahead of the steps."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return peak * (settings.minimum_factor + (1.0 - settings.minimum_factor) * decay(progress, settings))


def decay(progress: float, settings: OptimizerSettings) -> float:
    """From 1 at progress 0 to 0 at progress 1, by the schedule."""
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "polynomial":
        return (1.0 - progress) ** settings.power
    if settings.schedule == "cosine_restarts" and progress < 1.0:
        progress = progress * (settings.restarts + 1) % 1.0
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def averages_itself(optimizer: Any) -> bool:
    """Whether what the optimizer trains on is not what it wants to be judged by (schedule-free)."""
    return "train_mode" in optimizer.param_groups[0]


def switch(optimizer: Any, mode: str) -> None:
    """Put a schedule-free optimizer's weights into `train` or `eval` mode; others have none."""
    if averages_itself(optimizer):
        getattr(optimizer, mode)()


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's `state_dict`, copied to the CPU; of a weight's state tensors and plain values, no tables."""
    state = optimizer.state_dict()
    return {
        "state": {index: dict(flattened(entries)) for index, entries in state["state"].items()},
        "param_groups": [dict(flattened(group)) for group in state["param_groups"]],
    }


def flattened(entries: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Tables in tables as one, their keys joined; tensors copied, since some optimizers share one among weights."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}{NESTED}")
        else:
            yield f"{prefix}{key}", value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` took out, from a checkpoint or not."""
    nested: dict[int, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        table: dict[str, Any] = nested.setdefault(index, {})
        for key, value in entries.items():
            *path, last = key.split(NESTED)
            inner = table
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = value
    optimizer.load_state_dict({"state": nested, "param_groups": [dict(group) for group in state["param_groups"]]})
