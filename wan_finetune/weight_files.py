"""A denoiser's weights on disk, one tensor at a time: no more of a file is in memory than the tensor that is read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""What safetensors calls the dtypes of weights that are not quantised, and their bytes."""
WHY_NOT = (
    ", and neither their difference nor their sum with an adapter is what it would be in full precision; "
    "use the model as it was published"
)
"""Ends a refusal."""


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What a file says of a tensor before it is read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * PLAIN_DTYPES[self.dtype]


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one denoiser."""

    folder: Path
    heads: Mapping[str, TensorHead]
    """By the tensor's name, in the order of the files."""

    def read(self, name: str) -> "Tensor":
        """One tensor, as it is stored. It is mapped from its file and no longer when it is let go."""
        from safetensors import safe_open

        with safe_open(self.heads[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def stored_weights(folder: Path) -> StoredWeights:
    """The names and sizes of a denoiser's weights, in all of its files.

    Raises:
        InputError: when files are missing, damaged, or quantised.
    """
    from safetensors import SafetensorError, safe_open

    from .memory.loading import shards

    require_plain_config(folder)
    heads: dict[str, TensorHead] = {}
    for path in shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    heads[name] = TensorHead(path, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise InputError(f"{path}: damaged safetensors file ({error}); fetch it again") from None
    if odd := next((name for name, head in heads.items() if head.dtype not in PLAIN_DTYPES), None):
        raise InputError(f"{heads[odd].file}: {odd} is {heads[odd].dtype}: the weights are quantised{WHY_NOT}")
    return StoredWeights(folder, heads)


def require_plain_config(folder: Path) -> None:
    """Whether a denoiser's configuration speaks of plain weights.

    Raises:
        InputError: there is none, or it names a quantisation.
    """
    config = read_json(folder / "config.json")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise InputError(f"{folder}: is quantised ({method}, says config.json){WHY_NOT}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        InputError: it is missing or none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: has no {path.name}; fetch the model again") from None
    except ValueError:
        raise InputError(f"{path}: is not JSON; fetch the model again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no JSON object; fetch the model again")
    return content
