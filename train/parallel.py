"""What differs from engine to engine: how a model is held, a step is taken, and the whole state is read and set.

A state looks the same whatever wrote it: LoRA weights by their names, and the optimizer's `state_dict` as one process
would have it. So a run may go on under another engine, or another number of processes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from wan_finetune.adapters import lora_weights
from wan_finetune.errors import InputError

from .engine import engine_name
from .optim import load_optimizer_state, optimizer_state
from .optimizer_state import configuration_stays

SHARDED_OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam)
"""What may be cut up: each element's update depends on that element alone."""


def parallelize(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], gradient_clip: float
) -> "Parallel":
    """Put a model with LoRA and its optimizer under the accelerator's engine.

    An accelerator holds one model at a time: the one before must be closed.

    Args:
        model: at its `home_device`, but for blocks that are streamed.
        state: the optimizer's whole `state_dict`, on the CPU; empty at the beginning.
        gradient_clip: the largest norm of a gradient.

    Raises:
        InputError: the optimizer cannot be cut up.
    """
    engine = engine_name(accelerator)
    if engine not in ("single", "ddp") and type(optimizer) not in SHARDED_OPTIMIZERS:
        raise InputError(
            f"optimizer.name: {type(optimizer).__name__} does not run under {engine}, which cuts its state up; "
            'choose "adamw", or start with configs/accelerate/ddp.yaml'
        )
    kinds = {"fsdp2": FullyShardedParallel, "zero2": ZeroParallel, "zero3": ZeroParallel}
    return kinds.get(engine, Parallel)(accelerator, model, optimizer, state, gradient_clip)


class Parallel:
    """A model that each process holds whole: one process, or DDP."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        gradient_clip: float,
    ) -> None:
        self.accelerator, self.gradient_clip = accelerator, gradient_clip
        self.model: Any
        self.optimizer: Any
        self.prepare(model, optimizer, state)

    def prepare(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        if state:
            with configuration_stays(optimizer):
                load_optimizer_state(optimizer, state)
        # The model is where it belongs; blocks that are streamed must stay in host memory.
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer, device_placement=[False, True])

    @property
    def module(self) -> nn.Module:
        """The model without what the engine put around it."""
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged after a step's last one alone."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which is scaled for accumulation already."""
        self.accelerator.backward(loss)

    def update(self, loss: Tensor) -> tuple[float, float]:
        """Clip and take the step, unless loss or gradient are not finite: then nothing changes.

        Args:
            loss: of this process, scalar.

        Returns:
            The loss, a mean over processes, and the norm of the gradient before clipping.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = whole(self.accelerator.clip_grad_norm_(parameters, self.gradient_clip))
        loss_value, norm_value = self.accelerator.reduce(torch.stack([loss, norm.to(loss)]), "mean").tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_value, norm_value

    def weights(self) -> dict[str, Tensor]:
        """All LoRA weights, on the CPU; every process must ask."""
        return lora_weights(self.module)

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state of the optimizer, copied to the CPU; every process must ask."""
        return optimizer_state(self.optimizer)

    def close(self) -> None:
        """Give the device's memory back."""
        self.model = self.optimizer = None
        self.accelerator.free_memory()
        # accelerate collects garbage before it lets go of the model, whose wrapped forward refers to the model itself.
        clear_device_cache(garbage_collection=True)


class FullyShardedParallel(Parallel):
    """FSDP2: blocks are sharded; trained weights, their gradients and optimizer states are DTensors."""

    def prepare(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        # accelerate leaves precision to a policy here, which would cast what must stay fp32.
        model.forward = self.accelerator.autocast()(model.forward)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if state:
            with configuration_stays(self.optimizer):
                self.optimizer.load_state_dict(sharded(state, self.optimizer))

    def optimizer_state(self) -> dict[str, Any]:
        return on_cpu(self.optimizer.state_dict())

    def weights(self) -> dict[str, Tensor]:
        return adapter_weights(self.module, {name: whole(p) for name, p in trained(self.module).items()})


class ZeroParallel(Parallel):
    """DeepSpeed ZeRO-2 and ZeRO-3: each process updates its part of one flat vector of all trained weights."""

    def prepare(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        settings = self.accelerator.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = self.gradient_clip
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.stage = settings["zero_optimization"]["stage"]
        if self.stage == 3:
            import deepspeed

            # Cut up here, weight by weight: DeepSpeed would first put the whole expert on every card.
            deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
            for buffer in model.buffers():  # which stay behind then
                buffer.data = buffer.data.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if state:
            self.load_optimizer_state(state)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def update(self, loss: Tensor) -> tuple[float, float]:
        loss_value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(loss_value):
            return loss_value, math.nan
        # DeepSpeed clips inside its step, and skips the step when the norm is not finite.
        self.model.step()
        return loss_value, math.inf if self.optimizer.step_was_skipped else float(self.model.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return adapter_weights(self.module, {n: safe_get_full_fp32_param(p) for n, p in trained(self.module).items()})

    def optimizer_state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link_optimizer_state()
        inner = self.optimizer.optimizer.optimizer
        flat: dict[str, Any] = dict(next(iter(inner.state.values()), {}))
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, parameters in zip(inner.param_groups, self.groups, strict=True):
            numbers = range(len(state), len(state) + len(parameters))
            for number, parameter in zip(numbers, parameters, strict=True):
                state[number] = {
                    key: safe_get_full_optimizer_state(parameter, key) if value.ndim else value
                    for key, value in flat.items()
                }
            # In torch's order, so that files do not tell which engine wrote them.
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": list(numbers)})
        return on_cpu({"state": state if flat else {}, "param_groups": groups})

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """The inverse: each process keeps its part."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero = self.optimizer.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            # torch keeps a fused optimizer's count of steps beside the weights, another's on the CPU.
            steps_at = flat.device if zero.optimizer.defaults.get("fused") else torch.device("cpu")
            zero.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if value.ndim else value.to(steps_at, copy=True)
                for key, value in state["state"][0].items()
            }
        self.link_optimizer_state()
        for number, parameter in enumerate(p for group in self.groups for p in group):
            for key, value in state["state"][number].items():
                if not value.ndim:
                    continue
                if self.stage == 3:
                    # DeepSpeed's setter of a whole state reads past the end where the processes do not divide it.
                    size, rank = parameter.ds_tensor.numel(), self.accelerator.process_index
                    padded = nn.functional.pad(
                        value.flatten(), (0, size * self.accelerator.num_processes - value.numel())
                    )
                    safe_set_local_optimizer_state(parameter, padded[size * rank : size * (rank + 1)], key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def link_optimizer_state(self) -> None:
        """Let ZeRO-2's weights find their parts of the flat states; DeepSpeed does so after its first group's first
        update, and leaves the groups out that have no state by then."""
        if self.stage != 2:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.optimizer.optimizer
        for weights, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            if zero.optimizer.state.get(flat):
                lazy_init_hp_params_optimizer_state(weights, flat, zero.optimizer.state)

    def close(self) -> None:
        self.groups = []
        parameters: list[Any] = list(self.module.parameters()) if self.stage == 3 else []
        super().close()
        # DeepSpeed's partitioned weights outlive their engine, by its hooks and by a list of the whole process: what
        # they hold on the card is let go by hand.
        for parameter in parameters:
            nothing = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.data = parameter.ds_tensor.data = nothing
        if parameters:
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            FWD_MODULE_STACK.clear()
            clear_device_cache()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_weights(module: nn.Module, whole_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `lora_weights` gives of a model that is whole."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(module, state_dict=dict(whole_weights), adapter_name="default")
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in weights.items()}


def whole(value: Tensor) -> Tensor:
    """A sharded tensor's content, gathered; another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, each tensor cut as its weight is; every process has the whole and keeps its part."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(value: Any, weight: DTensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    entries = {
        number: {key: cut(value, weights[number]) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def on_cpu(value: Any) -> Any:
    """A copy of a nested state, its tensors whole and on the CPU; sharded ones are gathered."""
    if isinstance(value, Tensor):
        return whole(value.detach()).to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value
