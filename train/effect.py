"""How large a LoRA's update is beside the weights that it changes."""

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import Module


@torch.no_grad()
def effect_size(model: Module, taken: Mapping[str, Tensor] | None = None) -> float | None:
    """The mean over modules of |update| / |weight| (Frobenius); None where weights are quantised or split.

    `taken` is what was taken out of the base at the start (`inject_lora`): no part of the update, but of the weight.

    A few thousandths are usual for a look; nought is a dead adapter, and tenths leave little of the base.
    """
    from peft.tuners.lora import LoraLayer

    ratios = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            weight = layer.get_base_layer().weight
            if type(weight.data) is not torch.Tensor or not weight.is_floating_point() or not weight.numel():
                return None
            update = layer.get_delta_weight("default")
            if taken:
                a, b = (taken[f"{name}.lora_{half}.weight"].to(weight.device) for half in "AB")
                start = layer.scaling["default"] * b @ a
                weight, update = weight + start, update - start
            ratios.append(float(update.float().norm() / weight.float().norm()))
    return fmean(ratios) if ratios else None
