"""Whether a run fits, how long it takes and what to change: plain arithmetic over a few numbers, no torch."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wan_finetune.activations import Precision
from wan_finetune.costs import (
    Checkpointing,
    Flops,
    LoraShape,
    MicroBatch,
    Quantization,
    block_bytes,
    step_flops,
)
from wan_finetune.spec import TEMPORAL_STRIDE, TransformerDims
from wan_finetune.step_memory import MemoryPolicy, StepMemory, step_memory

from .hardware import GIB, Hardware

CONTEXT_BYTES = 0.7 * GIB
"""What CUDA, cuBLAS and cuDNN take before the first tensor. Stated, not measured."""
FRAGMENTATION = 0.03
"""Share of the activations that the allocator loses between blocks. Stated, not measured."""

QUANTIZATION_SECONDS: Mapping[Quantization, float] = {"none": 1.0, "fp8": 1.03, "int8": 1.05, "nf4": 1.12}
"""Factor on the time of linears for weights that are unpacked before each product. Stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketNumbers:
    """One training size of an expert."""

    name: str
    batch: MicroBatch
    checkpointing: Checkpointing


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNumbers:
    """One expert's training."""

    name: str
    steps: int
    lora: LoraShape
    policy: MemoryPolicy
    """Its checkpointing is each bucket's own."""
    buckets: tuple[BucketNumbers, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingNumbers:
    """All that fit and pace depend on."""

    dims: TransformerDims
    precision: Precision
    gradient_accumulation: int
    experts: tuple[ExpertNumbers, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lever:
    """A change and what it gives."""

    change: str
    gives_bytes: float
    peak_bytes: float
    fits: bool
    seconds: float
    """A step's time with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPlan:
    """Peak and pace of one training size of an expert."""

    expert: str
    bucket: BucketNumbers
    memory: StepMemory
    margin_bytes: float
    fits: bool | None
    """None where there is no GPU to hold it against."""
    flops: Flops
    """Of one micro-batch on one GPU."""
    seconds: float
    """Of an optimizer step."""
    levers: tuple[Lever, ...] = ()
    """Where it does not fit: single changes by what they give; where none fits, the quickest set that does, last."""

    @property
    def peak_bytes(self) -> float:
        return self.memory.total + self.margin_bytes


def plan_training(numbers: TrainingNumbers, hardware: Hardware) -> list[BucketPlan]:
    """Every expert's every bucket, in order."""
    return [plan_bucket(numbers, expert, bucket, hardware) for expert in numbers.experts for bucket in expert.buckets]


def plan_bucket(
    numbers: TrainingNumbers, expert: ExpertNumbers, bucket: BucketNumbers, hardware: Hardware
) -> BucketPlan:
    """One bucket as it is configured, with levers where it does not fit."""
    policy = replace(expert.policy, checkpointing=bucket.checkpointing)
    memory = step_memory(bucket.batch, numbers.dims, expert.lora, numbers.precision, policy)
    margin = margin_bytes(memory, hardware)
    fits = None if hardware.memory_bytes is None else memory.total + margin <= hardware.memory_bytes
    levers = find_levers(numbers, expert, bucket, policy, hardware) if fits is False else ()
    return BucketPlan(
        expert=expert.name,
        bucket=bucket,
        memory=memory,
        margin_bytes=margin,
        fits=fits,
        flops=step_flops(bucket.batch, numbers.dims, expert.lora, policy.checkpointing),
        seconds=step_seconds(numbers, expert.lora, bucket.batch, policy, hardware),
        levers=levers,
    )


def margin_bytes(memory: StepMemory, hardware: Hardware) -> float:
    """What a GPU needs beside the tensors of a step."""
    if not hardware.has_gpu:
        return 0.0
    return CONTEXT_BYTES + FRAGMENTATION * (memory.inputs + memory.working)


def step_seconds(
    numbers: TrainingNumbers, lora: LoraShape, batch: MicroBatch, policy: MemoryPolicy, hardware: Hardware
) -> float:
    """Of an optimizer step: operations over the stated rates, and what of the transfers they cannot hide."""
    rates = hardware.rates
    flops = step_flops(batch, numbers.dims, lora, policy.checkpointing)
    linear = flops.linear / (rates.linear_tflops * 1e12) * QUANTIZATION_SECONDS[policy.quantization]
    compute = linear + flops.attention / (rates.attention_tflops * 1e12)
    # Streamed weights come once forward and once backward; inputs of blocks go out and come back.
    moved = 2 * policy.stream_blocks * block_bytes(numbers.dims, numbers.precision.base_bytes, policy.quantization)
    if policy.checkpointing == "offloaded":
        moved += 2 * offloaded_bytes(batch, numbers.dims, numbers.precision)
    transfer = moved / (rates.host_gb_per_second * 1e9)
    return numbers.gradient_accumulation * max(compute, transfer)


def offloaded_bytes(batch: MicroBatch, dims: TransformerDims, precision: Precision) -> float:
    """Inputs of all blocks of a micro-batch."""
    return dims.num_layers * batch.tokens * dims.width * precision.activation_bytes


def find_levers(
    numbers: TrainingNumbers,
    expert: ExpertNumbers,
    bucket: BucketNumbers,
    policy: MemoryPolicy,
    hardware: Hardware,
) -> tuple[Lever, ...]:
    """What could be changed for a bucket that does not fit: each change alone, then the quickest set that fits."""
    here = peak_with(numbers, expert, bucket.batch, policy, hardware)

    def lever(change: str, batch: MicroBatch, changed: MemoryPolicy) -> Lever:
        peak = peak_with(numbers, expert, batch, changed, hardware)
        assert hardware.memory_bytes is not None
        return Lever(
            change=change,
            gives_bytes=here - peak,
            peak_bytes=peak,
            fits=peak <= hardware.memory_bytes,
            seconds=step_seconds(numbers, expert.lora, batch, changed, hardware),
        )

    batch = bucket.batch
    found = [lever(change, batch, changed) for change, changed in single_changes(policy, numbers.dims, hardware)]
    if not any(item.fits for item in found):
        changes = sets_of_changes(policy, numbers.dims, hardware)
        sets = [lever(change, batch, changed) for change, changed in changes]
        leanest = min(zip(sets, changes, strict=True), key=lambda pair: pair[0].peak_bytes)[1]
        if fitting := [item for item in sets if item.fits]:
            found.append(min(fitting, key=lambda item: (item.seconds, item.change.count("+"), item.peak_bytes)))
        elif shorter := shorter_batch(numbers, expert, batch, leanest[1], hardware):
            change = f"{leanest[0]} + a bucket of {shorter.num_frames} frames instead of {batch.num_frames}"
            found.append(lever(change, shorter, leanest[1]))
    if batch.clips > 1:
        found.append(lever("train.batch_size = 1, with gradient_accumulation", replace(batch, clips=1), policy))
    if shorter := shorter_batch(numbers, expert, batch, policy, hardware):
        found.append(lever(f"a bucket of {shorter.num_frames} frames instead of {batch.num_frames}", shorter, policy))
    helpful = [item for item in found if item.gives_bytes > 0]
    return tuple(sorted(helpful, key=lambda item: (" + " in item.change, -item.gives_bytes)))


def single_changes(policy: MemoryPolicy, dims: TransformerDims, hardware: Hardware) -> list[tuple[str, MemoryPolicy]]:
    """Every setting that takes less memory than the present one, alone."""
    changes: list[tuple[str, MemoryPolicy]] = []
    # Without checkpointing every weight that is unpacked would stay, and streamed ones would be gone when needed.
    recomputes = policy.checkpointing != "none"
    for quantization in ("fp8", "int8", "nf4") if recomputes else ("nf4",):
        changes.append((f'memory.quantization = "{quantization}"', replace(policy, quantization=quantization)))
    for checkpointing in ("selective", "full", "offloaded"):
        changes.append((f'memory.checkpointing = "{checkpointing}"', replace(policy, checkpointing=checkpointing)))
    streams = recomputes and policy.resident_denoisers == 1 and policy.quantization != "int8"
    for blocks in (dims.num_layers // 2, dims.num_layers) if streams else ():
        changes.append((f"memory.stream_blocks = {blocks}", replace(policy, stream_blocks=blocks)))
    if policy.resident_denoisers > 1:
        changes.append(('memory.resident = "one"', replace(policy, resident_denoisers=1)))
    if hardware.count > policy.shards and policy.quantization == "none":
        changes.append((f"FSDP over the {hardware.count} GPUs", replace(policy, shards=hardware.count)))
    return [(change, changed) for change, changed in changes if changed != policy]


def sets_of_changes(policy: MemoryPolicy, dims: TransformerDims, hardware: Hardware) -> list[tuple[str, MemoryPolicy]]:
    """Combinations of quantization, checkpointing, streaming and sharding."""
    quantizations = list(dict.fromkeys((policy.quantization, "fp8", "nf4")))
    policies = list(dict.fromkeys((policy.checkpointing, "full", "offloaded")))
    blocks = sorted({policy.stream_blocks, *(dims.num_layers * part // 4 for part in (1, 2, 3, 4))})
    shards = sorted({policy.shards, hardware.count})
    sets = []
    for quantization, checkpointing, streamed, sharded in itertools.product(quantizations, policies, blocks, shards):
        # What `wan_finetune/memory` refuses is not offered.
        if sharded > 1 and (streamed or quantization != "none"):
            continue
        if streamed and (quantization == "int8" or checkpointing == "none"):
            continue
        if quantization == "fp8" and checkpointing == "none":
            continue
        changed = replace(
            policy,
            quantization=quantization,
            checkpointing=checkpointing,
            stream_blocks=streamed,
            shards=sharded,
            resident_denoisers=1,
        )  # fmt: skip
        parts = []
        if quantization != policy.quantization:
            parts.append(f'memory.quantization = "{quantization}"')
        if checkpointing != policy.checkpointing:
            parts.append(f'memory.checkpointing = "{checkpointing}"')
        if streamed != policy.stream_blocks:
            parts.append(f"memory.stream_blocks = {streamed}")
        if sharded != policy.shards:
            parts.append(f"FSDP over the {sharded} GPUs")
        if policy.resident_denoisers > 1:
            parts.append('memory.resident = "one"')
        if parts:
            sets.append((" + ".join(parts), changed))
    return sets


def shorter_batch(
    numbers: TrainingNumbers, expert: ExpertNumbers, batch: MicroBatch, policy: MemoryPolicy, hardware: Hardware
) -> MicroBatch | None:
    """The longest clip of this size that fits, or None where not even a still does."""
    assert hardware.memory_bytes is not None
    low, high = -1, (batch.num_frames - 1) // TEMPORAL_STRIDE
    while high - low > 1:
        middle = (low + high) // 2
        tried = replace(batch, num_frames=middle * TEMPORAL_STRIDE + 1)
        fits = peak_with(numbers, expert, tried, policy, hardware) <= hardware.memory_bytes
        low, high = (middle, high) if fits else (low, middle)
    return None if low < 0 else replace(batch, num_frames=low * TEMPORAL_STRIDE + 1)


def peak_with(
    numbers: TrainingNumbers, expert: ExpertNumbers, batch: MicroBatch, policy: MemoryPolicy, hardware: Hardware
) -> float:
    memory = step_memory(batch, numbers.dims, expert.lora, numbers.precision, policy)
    return memory.total + margin_bytes(memory, hardware)


def total_seconds(numbers: TrainingNumbers, rows: list[BucketPlan]) -> tuple[float, float]:
    """Of all steps, (if every step took the quickest bucket, if every step took the slowest)."""
    shortest = longest = 0.0
    for expert in numbers.experts:
        times = [row.seconds for row in rows if row.expert == expert.name]
        shortest += expert.steps * min(times)
        longest += expert.steps * max(times)
    assert math.isfinite(longest)
    return shortest, longest
