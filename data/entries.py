"""One cache entry: named tensors and a record in one safetensors file, with checksums over both.

The files are written by safetensors and open in any program that reads its format. They are read here with plain reads
instead of the library's memory map: a mapped file that somebody shortens kills the process that touches it (SIGBUS),
and plain reads can put the bytes straight into a batch, which saves a copy.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from wan_finetune.errors import InputError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
"""What an entry may hold, by safetensors' names."""

MAX_HEADER_BYTES = 16 * 2**20
"""Above any record (a caption may be 1 MiB), below what a damaged length field would ask for."""

READ_BYTES = 512 * 2**10
"""How much is read before it is added to the checksum: little enough to be still in the processor's cache."""


class DamagedEntry(ValueError):
    """An entry is not what was written under its key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What an entry says of itself before its tensors."""

    tensors: Mapping[str, Any]
    """safetensors' dtype, shape and data_offsets of each tensor."""
    record: dict[str, str]
    """What the entry was made from."""
    checksums: Mapping[str, str]
    """Of each tensor, see `_checksum`."""
    data_start: int
    """Where in the file the tensors begin, in bytes."""


def pack(key: str, tensors: Mapping[str, Tensor], record: Mapping[str, str]) -> bytes:
    """The bytes of an entry's file.

    Raises:
        ValueError: a tensor of a dtype that is not in `DTYPES`.
    """
    # Copies, because safetensors refuses tensors that are parts of one memory.
    held = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    if wrong := {name: tensor.dtype for name, tensor in held.items() if tensor.dtype not in DTYPES.values()}:
        raise ValueError(f"the cache holds {', '.join(DTYPES)}; got {wrong}")
    written = json.dumps(dict(sorted(record.items())))
    checksums = {}
    for name, tensor in held.items():
        checksum = _checksum(key, written, name, tensor)
        checksum.update(_bytes_of(tensor))
        checksums[name] = checksum.hexdigest()
    metadata = {"key": key, "record": written, "xxh3_128": json.dumps(checksums)}
    return safetensors.torch.save(held, metadata=metadata)


def read_header(file: FileIO, key: str) -> Header:
    """The header of the entry of `key`; leaves the file behind it. Raises DamagedEntry."""
    size_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size_bytes - 8, MAX_HEADER_BYTES):
        raise DamagedEntry(f"it is cut short or no safetensors file, {size_bytes} bytes long")
    try:
        content = json.loads(file.read(length))
        metadata = content.pop("__metadata__")
        record = json.loads(metadata["record"])
        header = Header(
            tensors=content,
            record={str(name): str(value) for name, value in record.items()},
            checksums=json.loads(metadata["xxh3_128"]),
            data_start=8 + length,
        )
        end = max(int(entry["data_offsets"][1]) for entry in content.values())
        written_for = metadata["key"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedEntry(f"its header is not one that this cache writes ({type(error).__name__})") from None
    if written_for != key:
        raise DamagedEntry("it belongs to another key")
    if size_bytes != header.data_start + end:
        raise DamagedEntry(f"it is cut short: {size_bytes} bytes, {header.data_start + end} were written")
    return header


def describe(header: Header, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of a tensor. Raises DamagedEntry where there is none of this name."""
    try:
        entry = header.tensors[name]
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        first, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise DamagedEntry(f"it holds no tensor {name!r} that can be read") from None
    if first < 0 or min(shape, default=1) < 0 or end - first != math.prod(shape) * dtype.itemsize:
        raise DamagedEntry(f"size and shape of {name!r} disagree")
    return dtype, shape


def read_tensor(file: FileIO, header: Header, key: str, name: str, out: Tensor) -> None:
    """Read a tensor into `out`: contiguous, on the CPU, of the entry's own dtype and shape. Raises DamagedEntry."""
    written = json.dumps(dict(sorted(header.record.items())))
    checksum = _checksum(key, written, name, out)
    target = _bytes_of(out)
    file.seek(header.data_start + header.tensors[name]["data_offsets"][0])
    for start in range(0, len(target), READ_BYTES):
        part = target[start : start + READ_BYTES]
        filled = 0
        while filled < len(part):  # network disks may give less than was asked for
            received = file.readinto(part[filled:])
            if not received:
                raise DamagedEntry("it was cut short while it was read")
            filled += received
        checksum.update(part)
    if checksum.hexdigest() != header.checksums.get(name):
        raise DamagedEntry("its checksum does not match")


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether `shape` is the wanted one, in which None stands for any size."""
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))


def _checksum(key: str, written_record: str, name: str, tensor: Tensor) -> Any:
    """XXH3 begun with all that gives the bytes their meaning, so that damage anywhere in an entry shows.

    It is there against accidents and runs at the speed of memory; SHA-256 would take longer than reading.
    """
    meaning = [key, written_record, name, str(tensor.dtype), list(tensor.shape)]
    return xxhash.xxh3_128(json.dumps(meaning).encode())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def discard(path: Path, opened: os.stat_result, fault: str) -> bool:
    """Remove a damaged entry and say so; True where a new one has taken its place meanwhile, which stays."""
    try:
        if not os.path.samestat(path.stat(), opened):
            return True
        path.unlink()
        outcome = "removed; it is made again when the caches are next filled"
    except FileNotFoundError:
        return False
    except OSError as error:
        outcome = f"found, and it cannot be removed: {error.strerror}; remove it, or point data.cache at another folder"
    print(f"warning: {path}: damaged cache entry {outcome} ({fault})", file=sys.stderr)
    return False


def fail(path: Path, what: str, error: OSError) -> NoReturn:
    """Raise InputError for what a disk answered: the path, what could not be done, the reason and the remedy."""
    remedy = "check the disk, or point data.cache at another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what += ": the disk is full, or a limit on files is reached"
        remedy = "free some space or point data.cache at another disk, then run again: what is cached stays"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give this user the right to it, or point data.cache at another folder"
    raise InputError(f"{path}: {what} ({error.strerror}); {remedy}") from error
