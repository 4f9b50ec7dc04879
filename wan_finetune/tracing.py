"""A LoRA step of the real denoiser on tensors without storage: what it allocates, and how many operations it takes.

The model is diffusers', the LoRA PEFT's, checkpointing the trainer's, the backward pass torch's own. Only the bytes are
not there (`FakeTensorMode`), so that A14B at full size is traced on any machine in seconds. Fake tensors say they lie
on the CPU: a build of torch without CUDA aborts on fake CUDA tensors. What a kernel takes inside, such as a workspace
of cuBLAS, does not show.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .costs import Checkpointing, LoraShape, MicroBatch
from .spec import SPATIAL_MULTIPLE, TEMPORAL_STRIDE, TransformerDims


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What one step showed."""

    peak_bytes: int
    """Most that was allocated at once, weights and optimizer states included."""
    flops: int
    parameters: int
    """Of the base."""
    lora_parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSettings:
    """How the step runs."""

    checkpointing: Checkpointing = "full"
    base_dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    """bf16 autocast over the forward pass."""
    accumulated: bool = False
    """Gradients of earlier micro-batches are there already."""


def trace_step(dims: TransformerDims, lora: LoraShape, batch: MicroBatch, settings: TraceSettings) -> Traced:
    """Trace a step after the first one: the optimizer's states are there.

    Block inputs that "offloaded" keeps in host memory count as allocated here, as under "full".
    """
    peak, parameters, trainable = trace_memory(dims, lora, batch, settings)
    return Traced(
        peak_bytes=peak,
        flops=trace_flops(dims, lora, batch, settings),
        parameters=parameters,
        lora_parameters=trainable,
    )


def trace_at_depth(dims: TransformerDims, lora: LoraShape, batch: MicroBatch, settings: TraceSettings) -> Traced:
    """A step of all `dims.num_layers`, extrapolated from 2 and 4 layers, which is exact: blocks are all alike.

    Where LoRA differs from block to block, all of them are traced.
    """
    if dims.num_layers <= 4 or not lora.is_uniform(dims):
        return trace_step(dims, lora, batch, settings)
    two, four = (asdict(trace_step(replace(dims, num_layers=n), lora, batch, settings)) for n in (2, 4))
    return Traced(**{key: two[key] + (four[key] - two[key]) * (dims.num_layers - 2) // 2 for key in two})


def trace_memory(
    dims: TransformerDims, lora: LoraShape, batch: MicroBatch, settings: TraceSettings
) -> tuple[int, int, int]:
    """(most bytes allocated in a step, parameters of the base, trainable ones)."""
    model = build(dims, lora, settings)
    with fake_tensors(), AllocationTracker() as tracker:
        materialise(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, fused=True)
        make_states(optimizer, trainable)
        tracker.peak_bytes = tracker.live_bytes
        for _ in range(2 if settings.accumulated else 1):
            backward_of_micro_batch(model, dims, batch, settings)
        optimizer.step()
        peak = tracker.peak_bytes
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return peak, frozen, sum(p.numel() for p in trainable)


def make_states(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """What the first step leaves behind."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trace_flops(dims: TransformerDims, lora: LoraShape, batch: MicroBatch, settings: TraceSettings) -> int:
    """Operations of a micro-batch, forward and backward, by torch's flop counter."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # The CPU's flash attention has no formula of its own in torch; it is the same operation as CUDA's, which has.
    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    model = build(dims, lora, settings)
    with fake_tensors():
        materialise(model)
        # Counted apart from the allocations: the counter's hooks on modules keep tensors alive.
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            backward_of_micro_batch(model, dims, batch, settings)
    return counter.get_total_flops()


def backward_of_micro_batch(
    model: nn.Module, dims: TransformerDims, batch: MicroBatch, settings: TraceSettings
) -> None:
    """Forward, flow-matching loss and backward, as in training."""
    frames = 1 + (batch.num_frames - 1) // TEMPORAL_STRIDE
    side = SPATIAL_MULTIPLE // 2
    shape = (batch.clips, dims.in_channels, frames, batch.height // side, batch.width // side)
    latents, noise, sigma = torch.empty(shape), torch.empty(shape), torch.empty(batch.clips, 1, 1, 1, 1)
    text = torch.empty(batch.clips, batch.text_tokens, dims.text_dim, dtype=settings.base_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
        predicted = model(
            hidden_states=(1.0 - sigma) * latents + sigma * noise,
            timestep=sigma.flatten() * 1000,
            encoder_hidden_states=text,
            return_dict=False,
        )[0].float()
    loss = (predicted - (noise - latents)).square().mean()
    loss.backward()


def build(dims: TransformerDims, lora: LoraShape, settings: TraceSettings) -> nn.Module:
    """The denoiser with LoRA, on the meta device, in the dtypes in which it is trained."""
    from diffusers import WanTransformer3DModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    from .memory.checkpointing import Checkpointing, keep_lora_inputs_as_they_are
    from .memory.loading import kept_in_fp32
    from .memory.settings import MemorySettings

    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=dims.patch_size,
            num_attention_heads=dims.num_heads,
            attention_head_dim=dims.head_dim,
            in_channels=dims.in_channels,
            out_channels=dims.out_channels,
            text_dim=dims.text_dim,
            freq_dim=dims.freq_dim,
            ffn_dim=dims.ffn_dim,
            num_layers=dims.num_layers,
            cross_attn_norm=dims.cross_attn_norm,
        ).requires_grad_(False)
        for name, parameter in model.named_parameters():
            kept = kept_in_fp32(name)
            parameter.data = parameter.data.to(torch.float32 if kept else settings.base_dtype)
        model.add_adapter(LoraConfig(lora_dropout=lora.dropout, **injected(lora, dims)))
    cast_training_params(model, torch.float32)
    # All of `Fitting` but the move to the device, which fake tensors do not stand.
    Checkpointing(model, MemorySettings(checkpointing=settings.checkpointing), torch.device("cpu"))
    if settings.autocast:
        keep_lora_inputs_as_they_are(model)
    return model.train()


def injected(lora: LoraShape, dims: TransformerDims) -> dict[str, Any]:
    """PEFT's arguments that say where LoRA goes, and of which rank."""
    if not lora.modules:
        return {"r": lora.rank, "target_modules": list(lora.targets)}
    there = {name: rank for name, rank in lora.modules if int(name.split(".")[1]) < dims.num_layers}
    return {"r": lora.rank, "target_modules": list(there), "rank_pattern": {f"^{n}": r for n, r in there.items()}}


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have shapes and dtypes and no bytes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def materialise(model: nn.Module) -> None:
    """Replace every meta tensor of the model by a fake one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._free, size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _free(self, size: int) -> None:
        self.live_bytes -= size
