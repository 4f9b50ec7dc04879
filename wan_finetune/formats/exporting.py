"""Adapters written in a format, proved before they are put in place: all of them, or nothing."""

import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS
from .format import FileFormat

TOLERANCE = 1e-6
"""Relative difference of an update that folding a scale into fp32 weights may make."""


def export(adapters: Sequence[Adapter], file_format: FileFormat, out: Path) -> list[Path]:
    """Write each adapter's files into a folder; each was read back and says the same update.

    Raises:
        InputError: when the format cannot say one of them, or the folder cannot be written to or holds other files of
            these names; nothing is put in place then.
    """
    for adapter in adapters:
        title = EXPERTS[adapter.expert].title
        adapter.check(f"the adapter of {title}")
        if reason := file_format.refusal(adapter):
            raise InputError(f"{file_format.name}: the adapter of {title} is not written: {reason}")
    staging = out / f".{file_format.name}.{os.getpid()}.partial"
    try:
        staging.mkdir(parents=True)
        for adapter in adapters:
            path = staging / file_format.file_name(EXPERTS[adapter.expert])
            file_format.write(path, adapter)
            require_same_update(file_format.read(path, adapter.expert), adapter, path.name)
        moves = {path: out / path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
        if other := [new for old, new in moves.items() if new.exists() and not filecmp.cmp(old, new, shallow=False)]:
            raise InputError(f"{out}: already holds another {min(other).relative_to(out)}; give another folder")
        put_in_place(moves)
    except (OSError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        raise InputError(f"{out}: cannot be written ({reason}); give another folder, or free some room") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [out / file_format.file_name(EXPERTS[adapter.expert]) for adapter in adapters]


def put_in_place(moves: Mapping[Path, Path]) -> None:
    """Move files to where they belong; weights last, so that who waits for them finds what belongs beside them."""
    for path, target in sorted(moves.items(), key=lambda move: (move[0].suffix == ".safetensors", move)):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def require_same_update(read_back: Adapter, adapter: Adapter, name: str) -> None:
    """Whether two adapters' updates are the same in every module.

    Raises:
        RuntimeError: they are not; a fault of the format's module.
    """
    same = read_back.modules == adapter.modules and read_back.dora == adapter.dora
    for module in adapter.modules if same else ():
        first, second = ((each.weights, each.scale(module)) for each in (read_back, adapter))
        same &= torch.equal(first[0][f"{module}.lora_A.weight"], second[0][f"{module}.lora_A.weight"])
        b, wanted = (weights[f"{module}.lora_B.weight"] * scale for weights, scale in (first, second))
        same &= float((b - wanted).norm()) <= TOLERANCE * float(wanted.norm())
        if adapter.dora:
            magnitudes = (weights[f"{module}.lora_magnitude_vector"] for weights, _ in (first, second))
            same &= torch.equal(*magnitudes)
    if not same:
        raise RuntimeError(f"{name}: what was read back is not what was written")
