"""Reading adapters whatever their format: a file, a folder of them, or a run's folder."""

from pathlib import Path

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, ExpertName
from . import comfyui, diffusers, kohya, original, peft
from .files import Opened, open_adapter
from .format import FileFormat
from .holding import marked_experts
from .keys import meaning, shown

FORMATS: dict[str, FileFormat] = {
    each.name: each for each in (diffusers.FORMAT, comfyui.FORMAT, kohya.FORMAT, peft.FORMAT, original.FORMAT)
}


def recognised(opened: Opened) -> FileFormat:
    """The format of an opened file.

    Raises:
        InputError: it is none that is read here.
    """
    for file_format in FORMATS.values():
        if any(file_format.owns(key) for key in opened.tensors):
            return file_format
    known = ", ".join(f"{name} ({each.prefixes[0]}*)" for name, each in FORMATS.items())
    first = f"its first key is {shown(next(iter(opened.tensors)))}" if opened.tensors else "it is empty"
    raise InputError(f"{opened.path}: no adapter of a format that is read here, {known}; {first}")


def read_file(path: Path, expert: ExpertName | None = None, alpha: float | None = None) -> Adapter:
    """Read one adapter file of any format.

    Args:
        expert: which expert's it must be; a file that does not say is taken for this one's.
        alpha: of a file that says none.

    Raises:
        InputError: for a file that is damaged, foreign, or another expert's.
    """
    return read_opened(open_adapter(path), expert, alpha)


def read_opened(opened: Opened, expert: ExpertName | None = None, alpha: float | None = None) -> Adapter:
    """`read_file`, of a file that is open."""
    return recognised(opened).decode_own(opened, expert, alpha)


def read_expert(source: Path, expert: ExpertName, alpha: float | None = None) -> Adapter:
    """One expert's adapter from a file, an adapter folder, or a run's folder.

    Raises:
        InputError: when there is none, or it is another expert's.
    """
    for found, path in adapter_files(source):
        if found in (expert, None):
            return read_file(path, expert, alpha)
    name = EXPERTS[expert].file_name
    raise InputError(f"{source}: has no {name}, the adapter of {EXPERTS[expert].title}")


def read_all(source: Path, expert: ExpertName | None = None, alpha: float | None = None) -> list[Adapter]:
    """Every adapter of a file, an adapter folder, or a run's folder; of one expert if one is given.

    Raises:
        InputError: when there is none, or one is not sound.
    """
    if expert is not None:
        return [read_expert(source, expert, alpha)]
    return [
        read_file(path, each, alpha)
        for found, path in adapter_files(source)
        for each in ([found] if found else halves(path))
    ]


def halves(path: Path) -> list[ExpertName | None]:
    """Both experts where a file's keys name both, else nobody, which leaves it to the file's own facts.

    Raises:
        InputError: it is no safetensors file.
    """
    both = marked_experts(said for key in open_adapter(path).tensors if (said := meaning(key)))
    return [*sorted(both)] if len(both) > 1 else [None]


def adapter_files(source: Path) -> list[tuple[ExpertName | None, Path]]:
    """The adapter files that a path stands for, each with its expert as far as its name tells.

    Raises:
        InputError: there are none.
    """
    if source.is_file():
        return [(None, source)]
    if not source.is_dir():
        raise InputError(f"{source}: no such adapter file or folder")
    if (source / peft.WEIGHTS).is_file():
        return [(None, source / peft.WEIGHTS)]
    for place in (source, source / "adapter"):
        files = {
            expert.name: next((p for f in FORMATS.values() if (p := place / f.file_name(expert)).is_file()), None)
            for expert in EXPERTS.values()
        }
        if found := [(name, path) for name, path in files.items() if path]:
            return [*found]
    raise InputError(
        f"{source}: has no {' or '.join(e.file_name for e in EXPERTS.values())}, nor PEFT's {peft.WEIGHTS}; "
        "name the file itself"
    )
