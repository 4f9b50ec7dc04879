"""Tensors of a checkpoint file, a few rows at a time.

Nothing stays mapped: pages of a mapped file count as this process's memory, and a text encoder's file is 11 GB.
"""

import json
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError

MAX_HEADER_BYTES = 16 << 20
CHUNK_BYTES = 64 << 20
"""Read of a tensor at a time."""
REMAP_BYTES = 256 << 20
"""Read of a mapped .pth before it is mapped anew, which gives its pages back."""
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What is known of a tensor before its numbers are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int
    """Its place in the file, to read in the order of the disk."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """A file of named tensors."""

    path: Path
    tensors: dict[str, TensorFacts]
    metadata: dict[str, str]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension, in memory of their own; a scalar has one row."""
        ...


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors or .pth file and check that it is whole.

    Raises:
        InputError: another kind of file, or a damaged one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in {".pth", ".pt"}:
        return PthFile(path)
    if path.suffix == ".gguf":
        raise InputError(f"{path}: GGUF weights are quantised for good; convert from the bf16, fp16 or fp8 file")
    raise InputError(f"{path}: neither a .safetensors nor a .pth file")


def read_whole(file: TensorFile, name: str) -> Tensor:
    """All of a small tensor."""
    shape = file.tensors[name].shape
    return file.read_rows(name, 0, shape[0] if shape else 1)


def row_ranges(facts: TensorFacts) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are about `CHUNK_BYTES` each and cover the tensor once."""
    num_rows = facts.shape[0] if facts.shape else 1
    step = max(1, CHUNK_BYTES * num_rows // max(1, facts.num_bytes))
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


class SafetensorsFile:
    """A safetensors file, read by offset.

    The library's own reader maps the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, self._data_start = read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors = {name: facts_of(path, name, entry) for name, entry in header.items()}
        end = 0
        for name, facts in sorted(self.tensors.items(), key=lambda item: (item[1].position, item[1].num_bytes)):
            if facts.position != end:
                raise InputError(f"{path}: damaged: {name} does not begin where the tensor before it ends")
            end += facts.num_bytes
        size, wanted = path.stat().st_size, self._data_start + end
        if size != wanted:
            raise InputError(f"{path}: damaged: has {size} bytes, its table asks {wanted}; fetch it again")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        facts = self.tensors[name]
        row_shape = facts.shape[1:]
        row_bytes = prod(row_shape) * facts.dtype.itemsize
        shape = (stop - start, *row_shape) if facts.shape else ()
        buffer = bytearray((stop - start) * row_bytes)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self._data_start + facts.position + start * row_bytes)
            view = memoryview(buffer)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise InputError(f"{self.path}: ends inside {name}; fetch it again")
                view = view[count:]
        if not buffer:
            return torch.empty(shape, dtype=facts.dtype)
        return torch.frombuffer(buffer, dtype=facts.dtype).reshape(shape)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, and where the numbers begin."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path}: no safetensors file: its table is missing, cut or oversized; fetch it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise InputError(f"{path}: no safetensors file: its table is no JSON; fetch it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: no safetensors file: its table is no object")
    return header, 8 + length


def facts_of(path: Path, name: str, entry: Any) -> TensorFacts:
    """One line of a safetensors table, checked."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        shape = tuple(int(length) for length in shape)
        facts = TensorFacts(SAFETENSORS_DTYPES[dtype], shape, int(begin))
        num_bytes = int(end) - int(begin)
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{path}: {name} has an unknown kind of entry ({str(entry)[:80]})") from None
    if min(shape, default=0) < 0 or num_bytes != facts.num_bytes:
        raise InputError(f"{path}: damaged: {name} has {num_bytes} bytes, its shape asks {facts.num_bytes}")
    return facts


class PthFile:
    """A file of `torch.save` that holds tensors by name and nothing else.

    It is opened so that no code in it can run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._state = self._map()
        self._read_bytes = 0
        self.tensors = {
            name: TensorFacts(tensor.dtype, tuple(tensor.shape), place)
            for place, (name, tensor) in enumerate(self._state.items())
        }

    def _map(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(
                f"{self.path}: refused, because it holds more than tensors and opening it could run code ({reason})"
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(f"{self.path}: damaged, or not written by torch.save ({reason}); fetch it again") from None
        plain = isinstance(state, dict) and all(
            isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
            for name, value in state.items()
        )
        if not plain:
            raise InputError(f"{self.path}: is not a plain dictionary of tensors")
        for name, value in state.items():
            if not value.is_contiguous() or value.dtype not in DTYPE_NAMES:
                raise InputError(f"{self.path}: {name} is stored in an unknown way ({value.dtype})")
        return dict(state)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._read_bytes > REMAP_BYTES:
            self._state = {}
            self._state = self._map()
            self._read_bytes = 0
        tensor = self._state[name]
        rows = (tensor[start:stop] if tensor.ndim else tensor).clone()
        self._read_bytes += rows.nbytes
        return rows
