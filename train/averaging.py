"""The weights that an expert is exported with, where they are not those that it trains on."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter

from wan_finetune.adapters import lora_weights, set_lora_weights
from wan_finetune.errors import InputError
from wan_finetune.lora import TAKES_FROM_BASE

from .expert_settings import ExpertSettings
from .optim import averages_itself, switch

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from diffusers.training_utils import EMAModel


def require_whole_weights(settings: ExpertSettings, distributed_type: str) -> None:
    """Some settings put weights aside and back, which sharding engines do not have whole.

    Raises:
        InputError: when the two meet.
    """
    if distributed_type not in ("FSDP", "DEEPSPEED"):
        return
    needing = {
        "optimizer.ema_decay": settings.optimizer.ema_decay > 0,
        'optimizer.name = "schedulefree"': settings.optimizer.name == "schedulefree",
        f'lora.initialisation = "{settings.lora.initialisation}"': settings.lora.initialisation in TAKES_FROM_BASE,
    }
    if key := next((key for key, is_set in needing.items() if is_set), None):
        raise InputError(f"{key} needs whole weights in each process: train with DDP, not {distributed_type}")


@contextmanager
def other_weights(model: "WanTransformer3DModel", weights: Mapping[str, Tensor]) -> Iterator[None]:
    """These LoRA weights for the length of a block, and then those that were there."""
    kept = lora_weights(model)
    set_lora_weights(model, weights)
    try:
        yield
    finally:
        set_lora_weights(model, kept)


def make_average(
    model: "WanTransformer3DModel",
    parameters: Iterable[Parameter],
    decay: float,
    step: int,
    average: Mapping[str, Tensor],
) -> "EMAModel | None":
    """diffusers' moving average of the LoRA weights, from where it stood after `step`; None where there is none.

    Its decay after step n is min(decay, n / (9 + n)), so that the start does not linger.
    """
    if not decay:
        return None
    from diffusers.training_utils import EMAModel

    parameters = list(parameters)
    if average:
        weights = lora_weights(model)
        set_lora_weights(model, average)
    kept = EMAModel(parameters, decay=decay, foreach=True)
    kept.optimization_step = step
    if average:
        set_lora_weights(model, weights)
    return kept


def averaged_weights(
    model: "WanTransformer3DModel", parameters: Iterable[Parameter], optimizer: Any, average: "EMAModel | None"
) -> dict[str, Tensor]:
    """The averaged weights, on the CPU; empty where the last ones are exported. The model stays as it was, exactly."""
    if average is not None:
        parameters = list(parameters)
        average.store(parameters)
        average.copy_to(parameters)
        found = lora_weights(model)
        average.restore(parameters)
        return found
    if averages_itself(optimizer):
        weights = lora_weights(model)
        switch(optimizer, "eval")
        found = lora_weights(model)
        switch(optimizer, "train")
        # The way there and back rounds.
        set_lora_weights(model, weights)
        return found
    return {}
