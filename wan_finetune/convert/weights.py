"""The weights of one part of a model, spread over files, some of them scaled fp8: one name, one tensor."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .tensor_files import TensorFacts, TensorFile, open_tensors, read_whole, row_ranges

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Put before a denoiser's names by ComfyUI."""
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
UNUSED_SUFFIXES = (".scale_input", ".input_scale")
"""Scales of activations: they belong to fp8 arithmetic, which the unpacked weights do without."""
FORMAT_SUFFIX = ".comfy_quant"
MARKER = "scaled_fp8"
FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Kinds of quantised layers whose weight is its numbers times its scale."""
HARMLESS = {"format", "full_precision_matrix_mult"}
"""What a layer's description may say without changing the weight."""
EMBEDDINGS = ("shared.weight", "token_embedding.weight", "encoder.embed_tokens.weight")
"""Tables, not layers: ComfyUI stores them in fp8 without a scale."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; by the extremes, forty times as fast as one look at each."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a weight lies: its file, its key there, and the key of its scale."""

    file: TensorFile
    key: str
    scale: str | None = None

    @property
    def facts(self) -> TensorFacts:
        return self.file.tensors[self.key]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file.path}: {self.key}"

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight in `dtype`, some rows at a time: scaled in fp32, then rounded once.

        Raises:
            InputError: a number that is not finite, or too large for `dtype`.
        """
        for start, stop in row_ranges(self.facts):
            yield self.rows(start, stop, dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) in `dtype`; a scalar has one."""
        rows = self.file.read_rows(self.key, start, stop)
        if self.scale is not None:
            scale = read_whole(self.file, self.scale).float()
            rows = rows.float() * (scale[start:stop] if scale.numel() > 1 else scale.reshape(()))
        elif rows.dtype in FP8:
            rows = rows.float()
        cast = rows.to(dtype)
        if not is_finite(cast):
            fault = "too large for" if is_finite(rows) else "not finite, before it is made"
            raise InputError(f"{self.where} has a number that is {fault} {str(dtype).removeprefix('torch.')}")
        return cast

    def read(self, dtype: torch.dtype) -> Tensor:
        """All of the weight."""
        return torch.cat(list(self.chunks(dtype))) if self.facts.shape else next(self.chunks(dtype))


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a part by their original names, without ComfyUI's prefix."""

    tensors: dict[str, Stored]
    files: list[Path]
    extras: dict[str, Stored] = field(default_factory=dict)
    """What a file carries beside weights, such as ComfyUI's `spiece_model`."""
    unused: tuple[str, ...] = ()
    """Keys read and deliberately not converted: activation scales and markers."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].facts.shape


def collect(paths: Iterable[Path], extras: tuple[str, ...] = ()) -> Weights:
    """The weights of one part from its files.

    Args:
        paths: the files, of which each key must be in one.
        extras: names that are no weights, kept apart.

    Raises:
        InputError: a file that is damaged, a name that is there twice, or quantisation of an unknown kind.
    """
    tensors: dict[str, Stored] = {}
    kept: dict[str, Stored] = {}
    unused: list[str] = []
    files = []
    for path in paths:
        file = open_tensors(path)
        files.append(path)
        prefix = prefix_of(file)
        scales: dict[str, str] = {}
        for key in file.tensors:
            if key.endswith(SCALE_SUFFIXES) and scales.setdefault(key.rpartition(".")[0], key) != key:
                raise InputError(f"{path}: {key} and {scales[key.rpartition('.')[0]]} scale one weight")
        scaled = (
            check_formats(file) or bool(scales) or any(name.removeprefix(prefix) == MARKER for name in file.tensors)
        )
        for key, facts in file.tensors.items():
            name = key.removeprefix(prefix)
            if name in extras:
                kept[name] = Stored(file, key)
            elif name == MARKER or key.endswith((*UNUSED_SUFFIXES, FORMAT_SUFFIX)):
                unused.append(key)
            elif not key.endswith(SCALE_SUFFIXES):
                if name in tensors:
                    raise InputError(f"{path}: {name} is in {tensors[name].file.path.name} as well")
                layer, _, kind = key.rpartition(".")
                scale = scales.pop(layer, None) if kind == "weight" else None
                check_stored(file, key, facts, scale, scaled and name not in EMBEDDINGS)
                tensors[name] = Stored(file, key, scale)
        if scales:
            raise InputError(f"{path}: {min(scales.values())} scales a weight that the file does not hold")
    return Weights(tensors, files, kept, tuple(unused))


def prefix_of(file: TensorFile) -> str:
    """ComfyUI's prefix, where most of a file's names have it."""
    for prefix in PREFIXES:
        if 2 * sum(name.startswith(prefix) for name in file.tensors) > len(file.tensors):
            return prefix
    return ""


def check_stored(file: TensorFile, key: str, facts: TensorFacts, scale: str | None, scaled: bool) -> None:
    """A weight is of floating point, and fp8 layers of a scaled file have a scale of a known shape."""
    where = f"{file.path}: {key}"
    if facts.dtype not in FLOATS:
        kind = str(facts.dtype).removeprefix("torch.")
        raise InputError(f"{where} is {kind}, which is no weight that can be unpacked; convert from bf16, fp16 or fp8")
    if scale is None:
        if scaled and facts.dtype in FP8 and len(facts.shape) > 1:
            raise InputError(f"{where} is fp8 in a file of scaled fp8, but has no scale; fetch the file again")
        return
    shape = file.tensors[scale].shape
    per_row = (facts.shape[0], *[1] * (len(facts.shape) - 1)) if facts.shape else ()
    if file.tensors[scale].dtype not in FLOATS or shape not in {(), (1,), per_row}:
        raise InputError(f"{where} has a scale of the shape {list(shape)}; one number, or one a row, is known")


def check_formats(file: TensorFile) -> bool:
    """Each layer that says how it is quantised says something that is known here; whether any says it."""
    layers: dict[str, object] = {}
    try:
        layers.update(json.loads(file.metadata.get("_quantization_metadata", "{}")).get("layers", {}))
        for key in file.tensors:
            if key.endswith(FORMAT_SUFFIX):
                layers[key.removesuffix(FORMAT_SUFFIX)] = json.loads(bytes(read_whole(file, key).tolist()))
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{file.path}: says in an unknown way how its layers are quantised") from None
    for layer, said in layers.items():
        format_name = said.get("format") if isinstance(said, dict) else said
        others = {name for name, value in said.items() if value} - HARMLESS if isinstance(said, dict) else set()
        if format_name not in FORMATS or others:
            what = ", ".join([str(format_name), *sorted(others)])
            raise InputError(
                f"{file.path}: {layer} is quantised as {what}; {' and '.join(FORMATS)} are known. "
                "Convert from the bf16, fp16 or fp8 file"
            )
    return bool(layers)
