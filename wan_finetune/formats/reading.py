"""Reading adapters whatever their format: a file, a folder of them, or a run's folder."""

from pathlib import Path
from types import ModuleType

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from . import comfyui, diffusers
from .files import open_checked

FORMATS: dict[str, ModuleType] = {"diffusers": diffusers, "comfyui": comfyui}


def format_of(path: Path) -> str:
    """Name of a file's format.

    Raises:
        InputError: for a damaged file, or one of no format that is read here.
    """
    tensors, _ = open_checked(path)
    for name, file_format in FORMATS.items():
        if any(key.startswith(file_format.PREFIX) for key in tensors):
            return name
    known = ", ".join(f"{name} ({file_format.PREFIX}*)" for name, file_format in FORMATS.items())
    first = f"its first key is {next(iter(tensors))}" if tensors else "it is empty"
    raise InputError(f"{path}: no adapter of a format that is read here, {known}; {first}")


def read_file(path: Path, expert: ExpertName | None = None) -> Adapter:
    """Read one adapter file of any format, of this expert if one is given."""
    adapter: Adapter = FORMATS[format_of(path)].read(path, expert)
    return adapter


def read_expert(source: Path, expert: ExpertName) -> Adapter:
    """One expert's adapter from a file, an adapter folder, or a run's folder.

    Raises:
        InputError: when there is none, or it is another expert's.
    """
    if source.is_file():
        return read_file(source, expert)
    if not source.is_dir():
        raise InputError(f"{source}: no such adapter file or folder")
    name = EXPERTS[expert].file_name
    for folder in (source, source / "adapter"):
        if (folder / name).is_file():
            return read_file(folder / name, expert)
    raise InputError(f"{source}: has no {name}, the adapter of {EXPERTS[expert].title}")
