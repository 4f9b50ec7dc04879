"""What a LoRA is made of, the [lora] table, and which modules it reaches with which rank and alpha."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .errors import InputError
from .settings import Settings
from .spec import LORA_TARGETS

MAX_RANK = 1024
EXPRESSION = "re:"
"""Starts a name that is a regular expression for the whole of a module's name, not the end of one."""

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0)]
Initialisation = Literal["kaiming", "gaussian", "pissa", "olora"]

TAKES_FROM_BASE: tuple[Initialisation, ...] = ("pissa", "olora")
"""Starts whose product is not zero and is taken out of the base, so that the sum is the base as it was."""


class LoraSettings(Settings):
    """What is injected into an expert."""

    rank: Rank = 32
    """Rank of every LoRA pair."""
    alpha: Alpha | None = None
    """Scale of the update is alpha / rank. Left out: alpha = rank, of every module its own."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some modules, by the end of their names or `re:` and a regular expression."""
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """Other alphas for some modules, named in the same way."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the LoRA's input."""
    targets: tuple[str, ...] = Field(LORA_TARGETS, min_length=1)
    """Linears that carry LoRA, by the end of their names or `re:` and a regular expression for the whole name."""
    exclude: tuple[str, ...] = ()
    """Linears that carry none though `targets` names them, in the same way."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps a high rank from learning less."""
    dora: bool = False
    """Learn each output's magnitude apart from its direction. Slower; no ComfyUI file."""
    initialisation: Initialisation = "kaiming"
    """Where training starts. `pissa`: the base's largest singular directions; `olora`: its QR decomposition."""
    start_from: Path | None = None
    """An adapter, a file or a folder, whose weights training goes on from; rank and targets must be its own."""

    @field_validator("targets", "exclude", "rank_pattern", "alpha_pattern")
    @classmethod
    def expressions_compile(cls, value: Iterable[str]) -> Iterable[str]:
        for name in value:
            try:
                re.compile(name.removeprefix(EXPRESSION))
            except re.error as error:
                raise ValueError(f"{name!r} is no regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def parts_fit_together(self) -> "LoraSettings":
        if self.initialisation in TAKES_FROM_BASE:
            if self.dora:
                raise ValueError(f'initialisation = "{self.initialisation}" changes the base that dora measures')
            if max([self.rank, *self.rank_pattern.values()]) > MAX_RANK // 2:
                raise ValueError(
                    f'initialisation = "{self.initialisation}" is exported at twice the rank: at most {MAX_RANK // 2}'
                )
        if self.start_from is not None and self.initialisation != "kaiming":
            raise ValueError(f'start_from and initialisation = "{self.initialisation}" are two starts; leave one out')
        return self

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


def matches(pattern: str, name: str) -> bool:
    """Whether a module is meant: by the end of its name, or by an expression for the whole of it."""
    if pattern.startswith(EXPRESSION):
        return re.fullmatch(pattern.removeprefix(EXPRESSION), name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def targeted(names: Iterable[str], settings: LoraSettings) -> list[str]:
    """Those of a model's Linears that carry LoRA, in their order.

    Raises:
        InputError: when a name of `targets` or `exclude` reaches nothing, or one reaches out of the blocks.
    """
    names = list(names)
    wanted = [name for name in names if any(matches(target, name) for target in settings.targets)]
    for target in settings.targets:
        if not any(matches(target, name) for name in names):
            raise InputError(f"lora.targets: {target!r} matches no module; known are {', '.join(LORA_TARGETS)}")
    for excluded in settings.exclude:
        if not any(matches(excluded, name) for name in wanted):
            raise InputError(f"lora.exclude: {excluded!r} matches none of the {len(wanted)} modules in lora.targets")
    kept = [name for name in wanted if not any(matches(excluded, name) for excluded in settings.exclude)]
    if not kept:
        raise InputError("lora.exclude: leaves nothing of lora.targets")
    if stray := next((name for name in kept if not name.startswith("blocks.")), None):
        raise InputError(f"lora.targets: reaches {stray}, and only the blocks' Linears carry LoRA")
    return kept


def layout(modules: Iterable[str], settings: LoraSettings) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each module that carries LoRA.

    Raises:
        InputError: when a pattern reaches none of them, or two patterns say different things of one.
    """
    modules = list(modules)
    ranks = by_pattern("rank_pattern", settings.rank_pattern, modules)
    alphas = by_pattern("alpha_pattern", settings.alpha_pattern, modules)
    found = {}
    for module in modules:
        rank = int(ranks.get(module, settings.rank))
        found[module] = (rank, float(alphas.get(module, rank if settings.alpha is None else settings.alpha)))
    return found


def by_pattern(key: str, patterns: Mapping[str, float], modules: Iterable[str]) -> dict[str, float]:
    """What the patterns of `lora.KEY` say of each module that they reach."""
    said: dict[str, float] = {}
    first: dict[str, str] = {}
    for pattern, value in patterns.items():
        reached = [module for module in modules if matches(pattern, module)]
        if not reached:
            raise InputError(f"lora.{key}: {pattern!r} matches none of the modules in lora.targets")
        for module in reached:
            if said.setdefault(module, value) != value:
                raise InputError(f"lora.{key}: {first[module]!r} and {pattern!r} say different things of {module}")
            first.setdefault(module, pattern)
    return said
