"""What is to run together, read from the configuration and the launch, and held against the support table."""

from accelerate import Accelerator

from data.batches import TrainingData
from wan_finetune.lora import TAKES_FROM_BASE, LoraSettings
from wan_finetune.memory.quantization import check_installed
from wan_finetune.memory.support import Adaptation, Combination, check_supported

from .config import Config
from .engine import engine_name
from .terminal import say


def require_support(config: Config, accelerator: Accelerator) -> None:
    """Whether quantisation, engine, precision, streaming and the kind of LoRA train rightly together.

    Raises:
        InputError: naming the key, the reason and the remedy.
    """
    check_installed(config.memory.quantization)
    for expert in config.train.experts:
        check_supported(
            Combination(
                quantization=config.memory.quantization,
                engine=engine_name(accelerator),
                precision=config.train.mixed_precision,
                dtype=config.model.dtype,
                streaming=config.memory.stream_blocks > 0,
                adaptation=adaptation_of(config.expert(expert).lora),
                kept=config.memory.resident == "both",
            )
        )


def tell_of_policies_for_nothing(config: Config, data: TrainingData) -> None:
    """A bucket that is written wrongly would have the general policy in silence."""
    used = set(data.samples.column("bucket").tolist())
    for bucket in sorted(config.memory.checkpointing_by_bucket.keys() - used):
        say(f"warning: memory.checkpointing_by_bucket: no clip is in {bucket}; clips are in {', '.join(sorted(used))}")


def adaptation_of(lora: LoraSettings) -> Adaptation:
    """The kind of LoRA, as far as the base's form matters to it."""
    if lora.dora:
        return "dora"
    if lora.initialisation in TAKES_FROM_BASE:
        return "pissa" if lora.initialisation == "pissa" else "olora"
    return "lora"
