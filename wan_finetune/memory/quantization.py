"""The frozen base in fewer bits: which Linears, and how each kind stores and multiplies them.

Only the Linears of the blocks are quantised: 99 % of the weights. Patch embedding, time and text path, norms,
modulation and the output projection stay as diffusers loads them, the delicate ones in fp32. fp8 is diffusers'
layerwise casting, int8 torchao's weight-only configuration, nf4 bitsandbytes' Linear4bit with double quantisation. PEFT
wraps each of them by itself.

No GPU has run this yet: the kernels of the kinds were tried on the CPU.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .settings import Quantization

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

STORAGE_FP8 = torch.float8_e4m3fn
EXTRAS: dict[Quantization, tuple[str, str]] = {"int8": ("torchao", "ao"), "nf4": ("bitsandbytes", "bnb")}
"""Package and extra that a kind needs."""


def check_installed(quantization: Quantization) -> None:
    """Whether the kind's package is there.

    Raises:
        InputError: naming the extra.
    """
    package, extra = EXTRAS.get(quantization, (None, None))
    if package and find_spec(package) is None:
        raise InputError(
            f'memory.quantization = "{quantization}" needs {package}: pip install ".[{extra}]" in a checkout, '
            'or use "fp8", which needs nothing more'
        )


def block_linears(model: "WanTransformer3DModel") -> dict[str, nn.Linear]:
    """The Linears that are quantised, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def storage_dtype(quantization: Quantization, dtype: torch.dtype) -> torch.dtype:
    """What a block Linear's weight is cast to while it is read, on its way to the device."""
    return STORAGE_FP8 if quantization == "fp8" else dtype


def prepare(model: "WanTransformer3DModel", quantization: Quantization, dtype: torch.dtype) -> None:
    """Make room for quantised weights in a model that has none yet (on the meta device)."""
    if quantization != "nf4":
        return
    from bitsandbytes.nn import Linear4bit

    for name, linear in block_linears(model).items():
        packed = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        # On some CPUs an evaluation would pack the weights another way, for good, and not every shape can be packed so.
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed)
    # PEFT picks its Linear4bit wrapper by this mark, which diffusers' own quantizer sets as well.
    model.is_loaded_in_4bit = True


def set_weight(
    linear: nn.Linear, weight: Tensor, quantization: Quantization, device: torch.device, home: torch.device
) -> None:
    """Give a block Linear its weight [out, in], in `storage_dtype`: quantised on `device`, then kept at `home`."""
    if quantization == "nf4":
        from bitsandbytes.nn import Params4bit

        packed: Any = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        linear.weight = packed.to(device).to(home)
        return
    linear.weight = nn.Parameter(weight.to(home), requires_grad=False)
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        assert home == device, "the support table refuses int8 blocks that live elsewhere"
        quantize_(linear, Int8WeightOnlyConfig())


def finish(model: "WanTransformer3DModel", quantization: Quantization, dtype: torch.dtype) -> None:
    """What a kind needs once all weights are there."""
    if quantization == "int8":
        from diffusers import TorchAoConfig
        from diffusers.quantizers import DiffusersAutoQuantizer
        from torchao.quantization import Int8WeightOnlyConfig

        # Where PEFT looks for how a weight was quantised, to pack it again after merging.
        model.hf_quantizer = DiffusersAutoQuantizer.from_config(TorchAoConfig(Int8WeightOnlyConfig()))
    if quantization != "fp8":
        return
    for linear in block_linears(model).values():
        # PEFT makes LoRA weights in the base's dtype unless it names another to compute in: their start would be
        # rounded to fp8, seven values in all.
        setattr(linear, "compute_dtype", dtype)  # noqa: B010 - torch types attributes of modules as tensors
    model.enable_layerwise_casting(storage_dtype=STORAGE_FP8, compute_dtype=dtype)
