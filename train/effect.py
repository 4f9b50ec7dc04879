"""How large a LoRA's update is beside the weights that it changes."""

from statistics import fmean

import torch
from torch.nn import Module


@torch.no_grad()
def effect_size(model: Module) -> float | None:
    """The mean over modules of |update| / |weight| (Frobenius); None where weights are quantised or split.

    A few thousandths are usual for a look; nought is a dead adapter, and tenths leave little of the base.
    """
    from peft.tuners.lora import LoraLayer

    ratios = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            weight = layer.get_base_layer().weight
            update = layer.get_delta_weight("default")
            if type(weight.data) is not torch.Tensor or not weight.is_floating_point() or weight.shape != update.shape:
                return None
            ratios.append(float(update.float().norm() / weight.float().norm()))
    return fmean(ratios) if ratios else None
