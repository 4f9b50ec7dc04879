"""Writing and opening safetensors files safely."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from .keys import shown

MAX_HEADER_BYTES = 4 << 20
MAX_KEYS = 20_000
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of torch.save's archives and of bare pickles."""


class Opened(NamedTuple):
    """A safetensors file whose header was found sound; its values have not been looked at."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def save_atomically(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside the target, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
        save_file(ordered, partial, metadata=dict(metadata))
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


def open_adapter(path: Path) -> Opened:
    """Open a safetensors file from anywhere.

    The header is checked before a tensor is mapped: a file of 200 bytes can claim gigabytes.

    Raises:
        InputError: when the file is missing, damaged, or no safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such adapter file")
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Opened(path, tensors, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise InputError(f"{path}: damaged safetensors file ({shown(str(error))}); copy or download it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); look at its permissions and its disk") from None


def check_header(path: Path) -> None:
    """Whether a file's header is that of an adapter, read within bounds.

    Raises:
        InputError: it is missing, cut, oversized, or no table of tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start, brace = stream.read(8), stream.read(1)
        # A header of 640 bytes has a length that starts as a pickle does.
        if path.suffix.lower() in PICKLE_SUFFIXES or (start.startswith(PICKLE_STARTS) and brace != b"{"):
            raise InputError(
                f"{path}: a pickle (torch.save), which is not opened because reading one can run anything; have the "
                "tool that made it save safetensors, or convert it where you trust it: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InputError(
                f"{path}: not a safetensors file of an adapter (its header is missing, cut or oversized); "
                "copy or download it again"
            )
        text = brace + stream.read(length - 1)
    try:
        header = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, RepeatedName) else "is not JSON"
        raise InputError(f"{path}: not a safetensors file (its header {reason}); copy or download it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file (its header is no table); copy or download it again")
    if len(header) > MAX_KEYS:
        raise InputError(f"{path}: has {len(header)} tensors, more than any adapter (at most {MAX_KEYS})")


class RepeatedName(ValueError):
    """A name that stands twice in a JSON object, of which readers take one or the other."""


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dictionary. Raises RepeatedName."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RepeatedName("names one thing twice")
    return found
