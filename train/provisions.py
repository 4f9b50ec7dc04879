"""What a run needs beside its steps: the other stages, host memory, disk, caches, time for previews."""

from dataclasses import dataclass

from wan_finetune.activations import Precision
from wan_finetune.costs import (
    FP32_BYTES,
    Flops,
    MicroBatch,
    base_bytes,
    block_bytes,
    forward_flops,
    lora_parameters,
)
from wan_finetune.spec import VAE_PARAMETERS
from wan_finetune.step_memory import sampling_bytes, vae_encode_bytes

from .hardware import GIB, Hardware
from .planned_base import BaseFacts
from .planning import TrainingNumbers, offloaded_bytes

PROCESS_BYTES = 5 * GIB
"""Python, torch, CUDA's libraries and the loader of one process. Stated, not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingNumbers:
    """Previews and evaluation."""

    clips: int
    """In the whole run: midway, then base and adapter at the end."""
    evaluations: int
    """Of a denoiser for one clip; guidance takes two a step."""
    batch: MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class DataNumbers:
    """What the caches will hold."""

    windows: int | None
    """Latents of all clips in local folders; None where they cannot be counted without reading."""
    largest_latent_bytes: int
    """Of the largest bucket, its deviation included where it is kept."""
    text_bytes: int
    """Of a caption of the longest kind, 512 rows."""
    largest_clip: tuple[int, int, int]
    """Width, height and frames of the largest bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunNumbers:
    """A run in numbers: all that a plan is made of."""

    name: str
    base: BaseFacts
    training: TrainingNumbers
    sampling: SamplingNumbers
    data: DataNumbers
    keep_checkpoints: int
    notes: tuple[str, ...] = ()
    """What the figures leave out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of the run that is not a training step."""

    name: str
    gpu_bytes: float
    fits: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Provisions:
    """Bytes and seconds beside those of the steps."""

    stages: tuple[Stage, ...]
    host_bytes: dict[str, float]
    disk_bytes: dict[str, float]
    sampling_seconds: float


def provide(run: RunNumbers, hardware: Hardware, step_bytes: float) -> Provisions:
    """Everything but the steps, of which the largest takes `step_bytes`."""
    return Provisions(
        stages=stages(run, hardware),
        host_bytes=host_bytes(run, hardware, step_bytes),
        disk_bytes=disk_bytes(run),
        sampling_seconds=sampling_seconds(run, hardware),
    )


def stages(run: RunNumbers, hardware: Hardware) -> tuple[Stage, ...]:
    """GPU memory of encoding and sampling; nothing where they run on the CPU."""
    if hardware.memory_bytes is None:
        return ()
    dtype = run.training.precision.base_bytes
    needs = {"captions (text encoder)": float(run.base.text_encoder_parameters * dtype)}
    if run.base.has_wan_vae:
        needs["clips (autoencoder)"] = vae_encode_bytes(*run.data.largest_clip)
    if run.sampling.clips:
        # On a GPU the pipeline is opened in bf16, and holds one part at a time where all do not fit, or one block.
        dims = run.training.dims
        whole = sampling_bytes(run.sampling.batch, dims, 2)
        if whole + GIB <= hardware.memory_bytes:
            needs["previews (one denoiser)"] = whole
        else:
            blocks = (dims.num_layers - 1) * block_bytes(dims, 2, "none")
            needs["previews (block by block)"] = max(whole - blocks, float(run.base.text_encoder_parameters * 2))
    return tuple(
        Stage(name=name, gpu_bytes=needed, fits=needed + GIB <= hardware.memory_bytes) for name, needed in needs.items()
    )


def host_bytes(run: RunNumbers, hardware: Hardware, step_bytes: float) -> dict[str, float]:
    """RAM by stage, all processes of this machine together; without a GPU the steps are in it as well."""
    training = run.training
    dims, precision = training.dims, training.precision
    processes = hardware.count * PROCESS_BYTES if hardware.has_gpu else GIB
    pinned = loading = 0.0
    for expert in training.experts:
        block = block_bytes(dims, precision.base_bytes, expert.policy.quantization)
        offloaded = max(
            offloaded_bytes(b.batch, dims, precision) if b.checkpointing == "offloaded" else 0.0 for b in expert.buckets
        )
        streamed = expert.policy.stream_blocks * block * expert.policy.resident_denoisers
        pinned = max(pinned, hardware.count * (streamed + offloaded))
        loading = max(loading, base_bytes(dims, precision.base_bytes, "none"))
    encoder = run.base.text_encoder_parameters * precision.base_bytes
    # The pipeline of the previews is opened as a whole in host memory.
    sampled = 2 if hardware.has_gpu else 4
    pipeline = run.base.num_denoisers * base_bytes(dims, sampled, "none")
    pipeline += run.base.text_encoder_parameters * sampled + VAE_PARAMETERS * FP32_BYTES * run.base.has_wan_vae
    needs = {
        "encoding": processes + encoder,
        "training": processes + max(pinned, loading, 0.0 if hardware.has_gpu else step_bytes),
    }
    if run.sampling.clips:
        needs["previews"] = processes + pipeline
    return needs


def disk_bytes(run: RunNumbers) -> dict[str, float]:
    """What is written, or downloaded, by kind."""
    training = run.training
    parameters = sum(lora_parameters(training.dims, expert.lora) for expert in training.experts)
    states = sum(
        lora_parameters(training.dims, e.lora) * (FP32_BYTES + e.policy.optimizer_bytes) for e in training.experts
    )
    needs = {
        "base model": float(run.base.disk_bytes),
        # One more is there while the next is written.
        f"checkpoints ({run.keep_checkpoints} kept, one being written)": (run.keep_checkpoints + 1) * float(states),
        "adapters (diffusers and ComfyUI)": 2.0 * FP32_BYTES * parameters,
    }
    data = run.data
    entry = data.largest_latent_bytes + data.text_bytes
    if data.windows is None:
        needs["cache, for each 100 windows at most"] = 100.0 * entry
    else:
        needs[f"cache, for {data.windows} windows at most"] = float(data.windows * entry)
    return needs


def sampling_seconds(run: RunNumbers, hardware: Hardware) -> float:
    """Of all previews and evaluation clips; encoding text and decoding frames not counted."""
    flops: Flops = forward_flops(run.sampling.batch, run.training.dims)
    rates = hardware.rates
    once = flops.linear / rates.linear_tflops + flops.attention / rates.attention_tflops
    return run.sampling.clips * run.sampling.evaluations * once / 1e12


def lora_precision(precision: Precision) -> str:
    """What the frozen base and the activations are kept in, in words."""
    base = {2: "bf16", 4: "fp32"}[precision.base_bytes]
    return f"{base} base, {'bf16' if precision.autocast else 'fp32'} activations, fp32 LoRA"
