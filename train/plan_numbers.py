"""From a configuration to the numbers that a plan is made of: the one place of the planner that knows `Config`."""

import os
from dataclasses import replace

from data.buckets import Bucket
from data.config import SourceConfig
from wan_finetune.activations import Precision
from wan_finetune.costs import FP32_BYTES, LoraShape, MicroBatch, block_linears
from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS, ExpertName
from wan_finetune.lora import LoraSettings, layout, targeted
from wan_finetune.spec import TEXT_TOKENS, TransformerDims
from wan_finetune.step_memory import MemoryPolicy

from .config import Config
from .planned_base import BaseFacts, base_facts
from .planning import BucketNumbers, ExpertNumbers, TrainingNumbers
from .provisions import DataNumbers, RunNumbers, SamplingNumbers

OPTIMIZER_BYTES = {
    "adamw": 8,
    "adamw8bit": 2,
    "paged_adamw8bit": 2,
    "adafactor": 0,
    "muon": 4,
    "prodigy": 16,
    "schedulefree": 8,
}
"""Optimizer states of a trainable weight; adafactor's are rows and columns."""


def run_numbers(config: Config) -> RunNumbers:
    """A run in numbers; nothing is loaded, and of the clips only names are counted.

    Raises:
        InputError: a base of unknown size, an expert that it has not, or one without a bucket.
    """
    base = base_facts(config.model.base, config.model.public_name)
    single = base.num_denoisers == 1
    for name in config.train.experts:
        if (name == "single") != single:
            has = 'one denoiser, "single"' if single else 'two, "high" and "low"'
            raise InputError(f"train.experts: the base has no {name!r} expert; it has {has}")
    training = TrainingNumbers(
        dims=base.dims,
        precision=precision_of(config),
        gradient_accumulation=config.train.gradient_accumulation,
        experts=tuple(expert_numbers(config, name, base.dims) for name in EXPERTS if name in config.train.experts),
    )
    return RunNumbers(
        name=config.run.name,
        base=base,
        training=training,
        sampling=sampling_numbers(config),
        data=data_numbers(config, base),
        keep_checkpoints=config.train.keep_checkpoints,
        notes=notes_of(config),
    )


def precision_of(config: Config) -> Precision:
    """In what the step computes."""
    return Precision(
        base_bytes={"bfloat16": 2, "float32": 4}[config.model.dtype],
        autocast=config.train.mixed_precision == "bf16",
    )


def memory_policy(config: Config, name: ExpertName) -> MemoryPolicy:
    """The [memory] table, checkpointing apart, which each bucket may have its own of."""
    optimizer = config.expert(name).optimizer
    states = OPTIMIZER_BYTES.get(optimizer.name, OPTIMIZER_BYTES["adamw"])
    return MemoryPolicy(
        optimizer_bytes=states + (FP32_BYTES if optimizer.ema_decay else 0),
        accumulates=config.train.gradient_accumulation > 1,
        quantization=config.memory.quantization,
        stream_blocks=config.memory.stream_blocks,
        resident_denoisers=len(config.train.experts) if config.memory.resident == "both" else 1,
    )


def expert_numbers(config: Config, name: ExpertName, dims: TransformerDims) -> ExpertNumbers:
    """One expert's training in numbers."""
    expert = config.expert(name)
    buckets = buckets_of(config, name)
    if not buckets:
        raise InputError(
            f"data.buckets: none is for {EXPERTS[name].title}: stills go to the low-noise one alone; add a bucket for "
            "videos, name it in the experts of a source, or leave it out of train.experts"
        )
    return ExpertNumbers(
        name=name,
        steps=expert.steps,
        lora=lora_shape(expert.lora, dims),
        policy=memory_policy(config, name),
        buckets=tuple(
            BucketNumbers(
                name=str(bucket), batch=micro_batch(config, bucket), checkpointing=config.memory.policy(str(bucket))
            )
            for bucket in buckets
        ),
    )


def lora_shape(lora: LoraSettings, dims: TransformerDims) -> LoraShape:
    """A LoRA in numbers.

    Raises:
        InputError: a name that reaches no linear of a block.
    """
    names = [f"blocks.{layer}.{name}" for layer in range(dims.num_layers) for name in block_linears(dims)]
    modules = {name: rank for name, (rank, _) in layout(targeted(names, lora), lora).items()}
    plain = LoraShape(rank=lora.rank, targets=lora.targets, dropout=lora.dropout)
    said = {
        f"blocks.{layer}.{name}": rank
        for layer in range(dims.num_layers)
        for name, rank in plain.ranks(layer, dims).items()
        if rank
    }
    return plain if said == modules else replace(plain, modules=tuple(modules.items()))


def notes_of(config: Config) -> tuple[str, ...]:
    """What the configuration asks for and the figures leave out."""
    experts = {name: config.expert(name) for name in config.train.experts}
    notes = [
        f"{name}: lora.dora takes more memory and time than is counted" for name, e in experts.items() if e.lora.dora
    ]
    for name, expert in experts.items():
        if expert.optimizer.name not in OPTIMIZER_BYTES:
            notes.append(f"{name}: the states of {expert.optimizer.name} are taken for AdamW's, 8 bytes a weight")
    return tuple(notes)


def buckets_of(config: Config, name: ExpertName) -> list[Bucket]:
    """The buckets whose samples this expert may see, the largest first."""
    found = [
        bucket
        for source in config.data.sources
        for bucket in config.data.buckets_of(source)
        if sees(source, name, still=bucket.num_frames == 1)
    ]
    return sorted(dict.fromkeys(found), key=lambda bucket: -bucket.tokens)


def sees(source: SourceConfig, name: ExpertName, still: bool) -> bool:
    """Whether an expert sees a source's samples: as `data.batches.experts_of`, which needs torch."""
    return name in (source.experts or (("low", "single") if still else ("high", "low", "single")))


def micro_batch(config: Config, bucket: Bucket) -> MicroBatch:
    """Clips of a bucket that a process takes at once."""
    clips = config.train.batch_size
    if config.train.batch_tokens is not None:
        clips = max(1, config.train.batch_tokens // bucket.tokens)
    return MicroBatch(clips=clips, width=bucket.width, height=bucket.height, num_frames=bucket.num_frames)


def sampling_numbers(config: Config) -> SamplingNumbers:
    """Previews midway, then previews and trials with the base and with the adapter."""
    sampling, evaluation = config.sampling, config.evaluation
    previews = len(sampling.prompts) * len(sampling.seeds)
    trials = len(evaluation.prompts) * len(evaluation.seeds) or previews
    return SamplingNumbers(
        clips=previews + 2 * (previews + trials),
        evaluations=sampling.steps * (2 if sampling.guidance_scale > 1 else 1),
        batch=MicroBatch(
            clips=1, width=sampling.width, height=sampling.height, num_frames=sampling.num_frames
        ),
    )  # fmt: skip


def data_numbers(config: Config, base: BaseFacts) -> DataNumbers:
    """What the caches will hold."""
    data = config.data
    buckets = sorted({b for s in data.sources for b in data.buckets_of(s)}, key=lambda b: b.tokens)
    counts = [count_windows(config, source) for source in data.sources]
    sizes = [bucket.latent_bytes * (2 if data.latent_std else 1) for bucket in buckets]
    row_bytes = base.dims.text_dim * (2 if config.model.dtype == "bfloat16" else FP32_BYTES)
    largest = max(buckets, key=lambda bucket: bucket.width * bucket.height * bucket.num_frames)
    return DataNumbers(
        windows=sum(c for c in counts if c is not None) if all(c is not None for c in counts) else None,
        largest_latent_bytes=max(sizes),
        text_bytes=TEXT_TOKENS * row_bytes,
        largest_clip=(largest.width, largest.height, largest.num_frames),
    )


def count_windows(config: Config, source: SourceConfig) -> int | None:
    """Windows of the clips in a source's folder; None for what would have to be read, or is not there yet."""
    from data.sources.paths import is_media

    mode, several = config.data.windows_of(source)
    if source.path is None or not source.path.is_dir() or mode == "all" or source.shots:
        return None
    clips = sum(is_media(name) for _, _, names in os.walk(source.path) for name in names)
    return clips * (several if mode in ("uniform", "random") else 1)
