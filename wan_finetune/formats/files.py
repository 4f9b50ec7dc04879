"""Writing and opening safetensors files safely."""

import json
import os
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..experts import EXPERTS, ExpertName

ABOUT = "wan_finetune"
"""Metadata key of our own facts, one JSON object."""
MAX_HEADER_BYTES = 4 << 20
MAX_KEYS = 20_000


def save_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside the target, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, partial, metadata=metadata)
        sort_metadata(partial)
        partial.chmod(0o666 & ~current_umask())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sort_metadata(path: Path) -> None:
    """Put the metadata in order: safetensors leaves it to a randomised hash map, so equal files would differ."""
    with path.open("r+b") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same header must fit its own place"
        stream.seek(8)
        stream.write(text.ljust(length))
        stream.flush()
        os.fsync(stream.fileno())


def current_umask() -> int:
    """The process's umask; safetensors itself writes 0600 whatever it says."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file from anywhere.

    The header is checked before a tensor is mapped: a file of 200 bytes can claim gigabytes.

    Raises:
        InputError: when the file is missing, damaged, or no safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such adapter file")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path}: not a safetensors file (its header is missing, cut or oversized)")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise InputError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if len(header) > MAX_KEYS:
        raise InputError(f"{path}: has {len(header)} tensors, more than any adapter")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: damaged safetensors file ({error})") from None


def about_of(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """Our own facts in a file's metadata, the expert among them; empty in another tool's file."""
    try:
        about = json.loads(metadata.get(ABOUT, "{}"))
        return {str(key): str(value) for key, value in about.items()}
    except (ValueError, AttributeError):
        raise InputError(f"{path}: its metadata ({ABOUT}) is no JSON object") from None


def checked_expert(path: Path, said: str | None, wanted: ExpertName | None) -> ExpertName:
    """Whose adapter a file is: what it says, or what is wanted of one that says nothing.

    Raises:
        InputError: when neither says it, or they differ.
    """
    if said is None:
        if wanted is None:
            raise InputError(f"{path}: does not say of which expert it is; not written by this toolkit")
        return wanted
    known = next((name for name in EXPERTS if name == said), None)
    if known is None:
        raise InputError(f"{path}: unknown expert {said!r}")
    if wanted is not None and known != wanted:
        raise InputError(
            f"{path}: is the adapter of {EXPERTS[known].title}, not of {EXPERTS[wanted].title}; are the two swapped?"
        )
    return known
