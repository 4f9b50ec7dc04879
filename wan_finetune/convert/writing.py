"""Writing the files of a conversion: each beside its place, on the disk for good, then renamed; hashed on the way."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import InputError
from .parts import Part
from .shards import Shard
from .tensor_files import DTYPE_NAMES

BLOCK_BYTES = 16 << 20
PARTIAL = ".partial"


class HashingStream:
    """A file that is hashed as it is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.stream.write(data)


def write_file(path: Path, fill: Callable[[HashingStream], None]) -> str:
    """Write a file by `fill` and put it in place whole; its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as stream:
        hashing = HashingStream(stream)
        fill(hashing)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
    return hashing.digest.hexdigest()


def write_shard(path: Path, part: Part, shard: Shard) -> str:
    """Write one file of weights, a few rows at a time; its SHA-256."""

    def fill(stream: HashingStream) -> None:
        stream.write(table_of(shard))
        for name, original in shard.tensors.items():
            facts = shard.facts[name]
            written = 0
            for rows in part.weights.tensors[original].chunks(facts.dtype):
                data = memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                stream.write(data)
                written += data.nbytes
            assert written == facts.num_bytes, f"{name}: {written} bytes instead of {facts.num_bytes}"

    return write_file(path, fill)


def table_of(shard: Shard) -> bytes:
    """The table at the start of a safetensors file."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, facts in shard.facts.items():
        table[name] = {
            "dtype": DTYPE_NAMES[facts.dtype],
            "shape": list(facts.shape),
            "data_offsets": [facts.position, facts.position + facts.num_bytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_json(path: Path, content: object) -> str:
    """Write a JSON file; its SHA-256."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return write_file(path, lambda stream: stream.write(text.encode()))


def copy_file(source: Path, path: Path) -> str:
    """Copy a file; its SHA-256."""

    def fill(stream: HashingStream) -> None:
        with source.open("rb") as original:
            while block := original.read(BLOCK_BYTES):
                stream.write(block)

    return write_file(path, fill)


def hash_file(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut; filesystems that cannot are left alone."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
