"""From a file's content to an adapter: keys matched one by one, scales from tensors, PEFT's settings, or neither."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from ..facts import ABOUT, DERIVED, kept, listed
from ..lora import matches
from .files import Opened
from .keys import Meaning, meaning, shown, why_not

PATTERN_KEY = re.compile(r"\^?[\w.\\]+")
"""What a pattern in a file may be: a name. An expression from a stranger could take forever."""
NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
"""Fields of PEFT beside which `target_modules` do not say which modules carry LoRA."""
STARTS_IN_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""PEFT's starts that change the base, so that the weights alone are no update of it."""
NO_ALPHA = "alpha not in the file: taken as rank"


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


def assemble(
    opened: Opened,
    expert: ExpertName | None,
    alpha: float | None = None,
    config: Mapping[str, Any] | None = None,
    where: str = "metadata",
) -> Adapter:
    """The adapter in an opened file, checked.

    Args:
        expert: which expert's it must be; a file that does not say is taken for this one's.
        alpha: of a file that says none.
        config: PEFT's settings, where there are any, from `where`.

    Raises:
        InputError: for a damaged or foreign file, the other expert's, or an `alpha` that the file contradicts.
    """
    path, about = opened.path, about_of(opened)
    held = hold(opened, expert)
    marked = next(iter(held.experts)) if len(held.experts) == 1 else None
    said = about.pop("expert", None) or opened.metadata.get("expert") or marked
    found = checked_expert(path, said, expert)
    recorded = about.get("alpha")
    named = targets_of(about, held.ranks)
    try:
        adapter = from_config(found, held, dict(config or {}), kept(about))
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError, re.error):
        raise InputError(f"{path}: its {where} are none of PEFT's; save the adapter again") from None
    if (start := str((config or {}).get("init_lora_weights")).lower()).startswith(STARTS_IN_THE_BASE):
        raise InputError(
            f"{path}: was started by {shown(start, 20)}, which changed the base, so its weights alone are no update of "
            "it; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    lost = not config and not held.alphas and recorded not in (None, listed(adapter.alphas_used))
    if lost and alpha is None:
        raise InputError(
            f"{path}: was written with alpha {shown(str(recorded), 40)} and has lost it; say it by --alpha"
        )
    adapter = scaled(adapter, held, alpha, path, bool(config) or (recorded is not None and not lost))
    if named and not config:
        adapter = replace(adapter, targets=named)
    adapter.check(str(path))
    return adapter


def from_config(expert: ExpertName, held: Held, config: Mapping[str, Any], about: Mapping[str, str]) -> Adapter:
    """The adapter that PEFT would make of these weights under this configuration; without one, alpha is the rank."""
    shapes = held.ranks
    most = Counter(shapes.values()).most_common()[0][0]
    rank = int(config["r"]) if config else most
    # Each module's own rank is its alpha where nothing else is said, as diffusers has it.
    alpha = float(config["lora_alpha"] if config else most)
    if not 0 < alpha < float("inf"):
        raise ValueError(alpha)
    ranks = config.get("rank_pattern") or ({} if config else shapes)
    alphas = config.get("alpha_pattern") or ({} if config else shapes)
    targets = config.get("target_modules") or ()
    ranks = {module: int(said) for module in shapes if (said := resolved(ranks, module)) not in (None, rank)}
    alphas = {module: float(said) for module in shapes if (said := resolved(alphas, module)) not in (None, alpha)}
    exact = bool(targets) and not isinstance(targets, str) and not any(config.get(name) for name in NARROWING)
    magnitudes = any(name.endswith(".lora_magnitude_vector") for name in held.weights)
    return Adapter(
        expert=expert,
        rank=rank,
        alpha=alpha,
        # An expression, or nothing at all: the modules by name are as exact.
        targets=tuple(str(target) for target in targets) if exact else tuple(sorted(shapes)),
        weights=held.weights,
        ranks=ranks,
        alphas=alphas,
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", magnitudes)),
        about=about,
    )


def scaled(adapter: Adapter, held: Held, alpha: float | None, path: Path, configured: bool) -> Adapter:
    """The adapter with each module's alpha: the file's tensors before PEFT's settings, those before `alpha`.

    Args:
        configured: the adapter's alpha is what the file means, by PEFT's settings or because we wrote it.
    """
    ranks = held.ranks
    if (configured or held.alphas) and alpha is not None:
        raise InputError(f"{path}: says its alpha itself; leave --alpha out")
    if held.alphas:
        # Where a tensor is missing among others, its readers apply B A as it is.
        alphas = {module: held.alphas.get(module, float(rank)) for module, rank in ranks.items()}
        usual = Counter(alphas.values()).most_common()[0][0]
        return replace(adapter, alpha=usual, alphas=apart(alphas, usual), rslora=False)
    if configured:
        return adapter
    if alpha is not None:
        return replace(adapter, alpha=float(alpha), alphas={})
    return replace(adapter, assumed=(NO_ALPHA,))


def apart(values: Mapping[str, float], usual: float) -> dict[str, float]:
    return {module: value for module, value in values.items() if value != usual}


def resolved(patterns: Mapping[str, float], module: str) -> float | None:
    """What PEFT's patterns say of a module (peft.utils.other.get_pattern_key), None where nothing."""
    for key, value in patterns.items():
        if not PATTERN_KEY.fullmatch(key):
            raise ValueError(key)
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None


def targets_of(about: dict[str, str], modules: Iterable[str]) -> tuple[str, ...]:
    """The targets among our own facts, which are taken out; none where they do not name these modules.

    Names of tensors do not tell a target of every block from one of some.
    """
    said = about.get("targets", "null")
    for name in DERIVED:
        about.pop(name, None)
    try:
        targets = [str(target) for target in json.loads(said) or ()]
    except (ValueError, TypeError, RecursionError):
        return ()
    named = all(any(matches(target, module) for target in targets) for module in modules)
    return tuple(targets) if named and not any(target.startswith("re:") for target in targets) else ()


def about_of(opened: Opened) -> dict[str, str]:
    """Our own facts in a file's metadata, the expert among them; empty in another tool's file."""
    try:
        about = json.loads(opened.metadata.get(ABOUT, "{}"))
        return {str(key): str(value) for key, value in about.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{opened.path}: its metadata ({ABOUT}) is no JSON object; save the adapter again") from None


def json_of(opened: Opened, key: str) -> dict[str, Any]:
    """A JSON object in a file's metadata; empty where there is none.

    Raises:
        InputError: for something else.
    """
    try:
        found = json.loads(opened.metadata.get(key, "{}"))
        return {str(name): value for name, value in found.items()}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{opened.path}: its metadata ({key}) are none of PEFT's; save the adapter again") from None


def checked_expert(path: Path, said: str | None, wanted: ExpertName | None) -> ExpertName:
    """Whose adapter a file is: what it says, or what is wanted of one that says nothing.

    Raises:
        InputError: when neither says it, or they differ.
    """
    if said is None:
        if wanted is None:
            guess = re.search(r"(high|low)[_-]?noise", path.name.lower())
            hint = f"its name means --expert {guess[1]}" if guess else "say it with --expert high, low or single"
            raise InputError(f"{path}: does not say of which expert it is; {hint}")
        return wanted
    known = next((name for name in EXPERTS if name == said), None)
    if known is None:
        raise InputError(f"{path}: unknown expert {shown(said)!r}; known are {', '.join(EXPERTS)}")
    if wanted is not None and known != wanted:
        raise InputError(
            f"{path}: is the adapter of {EXPERTS[known].title}, not of {EXPERTS[wanted].title}; are the two swapped?"
        )
    return known
