"""From what a file holds to an adapter: scales as its tensors, PEFT's settings or nobody says."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from ..facts import ABOUT, DERIVED, kept, listed
from ..lora import EXPRESSION, matches
from .files import Opened
from .holding import Held, hold
from .keys import shown
from .names import original

PATTERN_KEY = re.compile(r"\^?[\w.\\]+")
"""What a pattern in a file may be: a name. An expression from a stranger could take forever."""
NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
"""Fields of PEFT beside which `target_modules` do not say which modules carry LoRA."""
STARTS_IN_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's starts that change the base, so that the weights alone are no update of it."""
SAID_BY_EXPORT = "`wan-finetune export` takes it, and writes a file that says it itself"
"""Where an option is to be had, since not every command that reads adapters has it."""
NO_ALPHA = "alpha not in the file: taken as rank"


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
            f"{path}: was written with alpha {shown(str(recorded), 40)} and has lost it; say it by --alpha: "
            f"{SAID_BY_EXPORT}"
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
    exact = not isinstance(targets, str) and not any(config.get(name) for name in NARROWING)
    exact = exact and reach(targets, shapes)
    magnitudes = any(name.endswith(".lora_magnitude_vector") for name in held.weights)
    return Adapter(
        expert=expert,
        rank=rank,
        alpha=alpha,
        # An expression, the original code's names, or nothing at all: the modules by name are as exact.
        targets=tuple(map(str, targets)) if exact else tuple(sorted(shapes)),
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
    """What PEFT's patterns say of a module (peft.utils.other.get_pattern_key), None where nothing.

    They are of the model that was trained, which may have had the original names.
    """
    for key, value in patterns.items():
        if not PATTERN_KEY.fullmatch(key):
            raise ValueError(key)
        if any(re.match(rf"(.*\.)?({key})$", name) for name in (module, original(module))):
            return value
    return None


def reach(targets: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether these ends of names reach every one of the modules."""
    targets = list(targets)
    return all(any(matches(str(target), module) for target in targets) for module in modules)


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
    named = reach(targets, modules) and not any(target.startswith(EXPRESSION) for target in targets)
    return tuple(targets) if named else ()


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
            raise InputError(f"{path}: does not say of which expert it is; {hint}: {SAID_BY_EXPORT}")
        return wanted
    known = next((name for name in EXPERTS if name == said), None)
    if known is None:
        raise InputError(f"{path}: unknown expert {shown(said)!r}; known are {', '.join(EXPERTS)}")
    if wanted is not None and known != wanted:
        raise InputError(
            f"{path}: is the adapter of {EXPERTS[known].title}, not of {EXPERTS[wanted].title}; are the two swapped?"
        )
    return known
