"""Adapters that go into an operation, and the folder that comes out of it."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from ..formats.reading import read_all, read_expert


@dataclass(frozen=True)
class Source:
    """One of the adapters that were given, with the experts that it has."""

    path: Path
    adapters: dict[ExpertName, Adapter]


def open_source(path: Path) -> Source:
    """The adapters of a file, an adapter folder or a run's folder.

    Raises:
        InputError: when there is none, or one that is damaged.
    """
    return Source(path, {adapter.expert: adapter for adapter in read_all(path)})


def require_free(out: Path) -> None:
    """Whether a folder can take an adapter.

    Raises:
        InputError: it holds one already, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder")
    for expert in EXPERTS.values():
        for file in (out / expert.file_name, out / "comfyui" / expert.file_name):
            if file.exists():
                raise InputError(f"{out}: already holds {file.relative_to(out)}; give another folder")


def write_adapters(out: Path, adapters: Sequence[Adapter]) -> list[Path]:
    """Write an adapter folder whole or not at all, read back to the bit.

    Raises:
        InputError: when it holds an adapter, or cannot be written to.
    """
    from safetensors import SafetensorError

    from ..export import require_equal, write_adapter_folder

    require_free(out)
    try:
        with beside(out) as partial:
            written = write_adapter_folder(partial, adapters)
            for adapter in adapters:
                require_equal(read_expert(partial, adapter.expert), adapter, partial)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{out}: cannot be written ({reason}); give another folder, or free some room") from None
    return [out / path.relative_to(partial) for path in written]


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` whose content goes there at the end; nothing does when the body raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        if out.exists():
            for file in sorted(path for path in partial.rglob("*") if path.is_file()):
                target = out / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
