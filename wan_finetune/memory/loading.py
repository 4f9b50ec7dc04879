"""A base expert from its files, tensor by tensor, each straight to its dtype, its quantised form and its device.

The official repository is fp32, 57 GB an expert. diffusers 0.42's `from_pretrained` casts on the way as well, and keeps
every shard mapped meanwhile: its peak is the files plus the target, three times a bf16 target (measured); fp8 is cast
after all of bf16 is there. Here one shard is mapped at a time, a block may have another home than the rest, and tensors
that a thread has read before are taken as well.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from .quantization import finish, prepare, set_weight, storage_dtype
from .settings import Quantization

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
NamedTensors = Iterable[tuple[str, Tensor]]
Placement = Callable[[str], torch.device]


def load_base(
    folder: Path,
    dtype: torch.dtype,
    quantization: Quantization,
    placement: Placement,
    device: torch.device,
    tensors: NamedTensors | None = None,
) -> "WanTransformer3DModel":
    """A frozen expert in `dtype`, its block Linears quantised; diffusers' choice of fp32 parts stays.

    Args:
        folder: the expert's own, such as BASE/transformer.
        placement: where a parameter of that name lives.
        device: where quantisation is computed, wherever the result lives, so that the bytes do not depend on it.
        tensors: what `read_weights` would give, if it was read before.

    Raises:
        InputError: weights that are missing, unknown, or of another shape.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    missing = {name: value.shape for name, value in model.named_parameters()}
    prepare(model, quantization, dtype)
    for name, tensor in tensors if tensors is not None else read_weights(folder, dtype, quantization):
        if name not in missing:
            if not any(name.endswith(f".{part}.weight") for part in model._keys_to_ignore_on_load_unexpected):
                raise InputError(f"{folder}: {name} is no weight of this model; its config.json and weights differ")
            continue
        if tensor.shape != missing[name]:
            raise InputError(f"{folder}: {name} is {tuple(tensor.shape)}, config.json asks {tuple(missing[name])}")
        del missing[name]
        place(model, name, tensor, quantization, device, placement(name))
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing, {min(missing)} the first; fetch it again")
    for buffers in {name.rpartition(".")[0] for name, _ in model.named_buffers()}:
        model.get_submodule(buffers).to(device)
    finish(model, quantization, dtype)
    return model.requires_grad_(False).eval()


def place(
    model: nn.Module, name: str, tensor: Tensor, quantization: Quantization, device: torch.device, home: torch.device
) -> None:
    """Put one tensor, as `read_weights` gives it, into the model."""
    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    if is_quantized_weight(name, module):
        assert isinstance(module, nn.Linear)
        set_weight(module, tensor, quantization, device, home)
    else:
        setattr(module, kind, nn.Parameter(tensor.to(home), requires_grad=False))


def is_quantized_weight(name: str, module: nn.Module) -> bool:
    """Whether a parameter is one that quantisation packs."""
    return name.startswith("blocks.") and name.endswith(".weight") and isinstance(module, nn.Linear)


def read_weights(folder: Path, dtype: torch.dtype, quantization: Quantization) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an expert, cast to what it is kept in; each owns its memory, none is mapped from the file."""
    from safetensors import safe_open

    for shard in shards(folder):
        with safe_open(shard, "pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise InputError(f"{shard}: {name} is {tensor.dtype}; the base must be stored unquantised")
                wanted = torch.float32 if kept_in_fp32(name) else dtype
                cast = tensor.to(wanted, copy=True)
                if is_block_matrix(name, tensor):
                    cast = cast.to(storage_dtype(quantization, dtype))
                yield name, cast


def kept_in_fp32(name: str) -> bool:
    """Whether diffusers keeps a tensor in fp32 when it opens a model in another dtype."""
    from diffusers import WanTransformer3DModel

    return not set(WanTransformer3DModel._keep_in_fp32_modules).isdisjoint(name.split("."))


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of the file is a block Linear's weight: the matrices of a block are just those."""
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2


def shards(folder: Path) -> list[Path]:
    """The weight files of an expert, in their order.

    Raises:
        InputError: when there are none, or one that the index names is not there.
    """
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS]
    files = [folder / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder}: {absent[0]} is not there ({len(absent)} of {len(files)}); fetch the base again")
    return files
