"""Another strength, baked into the file."""

import math
from dataclasses import replace
from pathlib import Path

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from . import facts
from .sources import open_source, require_free, write_adapters


def scale(source: Path, out: Path, strengths: tuple[float, float]) -> list[str]:
    """Write an adapter that does at strength 1 what this one does at `strengths`, (high, low).

    Raises:
        InputError: for a strength that no file can hold.
    """
    for strength in strengths:
        if not (math.isfinite(strength) and strength > 0):
            raise InputError(
                f"--strength: {strength:g} must be above 0; leave an expert's file out instead of scaling it to 0, "
                'and take a look away with "merge" and a negative weight'
            )
    require_free(out)
    of: dict[ExpertName, float] = {"high": strengths[0], "low": strengths[1], "single": strengths[0]}
    adapters = [scaled(adapter, of[name]) for name, adapter in open_source(source).adapters.items()]
    lines = [str(path) for path in write_adapters(out, adapters)]
    return lines + [f"{EXPERTS[adapter.expert].title}: alpha {adapter.alpha:g}" for adapter in adapters]


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter at this strength: alpha changes, no tensor does. Of a DoRA too, the update before its magnitudes."""
    return replace(
        adapter,
        alpha=adapter.alpha * strength,
        alphas={module: alpha * strength for module, alpha in adapter.alphas.items()},
        about=facts.after(adapter.about, f"scale {strength:g}"),
    )
