"""The accelerator, checked: accelerate falls back to fewer processes, or to another engine, without a word."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env

from wan_finetune.errors import InputError
from wan_finetune.memory.support import Engine

from .config import Config
from .tracking import log_folder

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and processes as launched.

    Precision, accumulation and clipping are the configuration's: whatever accelerate's or DeepSpeed's own files say of
    them is refused, so that each has one owner.

    Raises:
        InputError: when what the launcher asked for is not what accelerate set up, or the trainer cannot run under it.
    """
    tracker = None if config.tracking.tracker == "none" else config.tracking.tracker
    if tracker and find_spec(tracker) is None:
        raise InputError(f'tracking.tracker = "{tracker}": not installed; pip install {tracker}, or set it to "none"')
    fsdp = fsdp_plugin() if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    deepspeed = deepspeed_plugin(config) if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None
    accelerator = Accelerator(
        # DeepSpeed's bf16 mode casts the whole model, LoRA and time path too; its autocast is accelerate's.
        mixed_precision="no" if deepspeed else config.train.mixed_precision,
        # The trainer counts micro-batches itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        fsdp_plugin=fsdp,
        deepspeed_plugin=deepspeed,
        log_with=tracker,
        project_dir=str(log_folder(config)),
    )
    if deepspeed:
        # accelerate registers a ZeRO-3 configuration with transformers, which would then cut up the text encoder.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    check_launch(accelerator, asked_engine(fsdp, deepspeed))
    return accelerator


def engine_name(accelerator: Accelerator) -> Engine:
    """How the processes of this accelerator share the work."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stages: dict[int, Engine] = {2: "zero2", 3: "zero3"}
        return stages[accelerator.deepspeed_plugin.zero_stage]
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


def asked_engine(fsdp: "FullyShardedDataParallelPlugin | None", deepspeed: "DeepSpeedPlugin | None") -> Engine:
    """The engine that the launcher's variables name."""
    if deepspeed:
        return "zero3" if deepspeed.zero_stage == 3 else "zero2"
    if fsdp:
        return "fsdp2"
    return "single" if asked_processes() == 1 else "ddp"


def asked_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(accelerator: Accelerator, asked: Engine) -> None:
    """Whether the launcher's wish came true."""
    runs, processes = engine_name(accelerator), accelerator.num_processes
    # One process started as one of several (torchrun --nproc-per-node 1) is what was asked for.
    same = runs == asked or {runs, asked} == {"single", "ddp"}
    if not same or processes != asked_processes():
        on_cpu = (
            "; on a CPU only plain data parallelism runs: ACCELERATE_USE_CPU=true torchrun "
            f"--nproc-per-node {asked_processes()} -m train ..."
            if accelerator.device.type == "cpu"
            else ""
        )
        raise InputError(
            f"the launcher asked for {asked_processes()} processes under {asked} and accelerate runs {processes} "
            f"under {runs} ({accelerator.distributed_type}, {accelerator.device}){on_cpu}"
        )


def fsdp_plugin() -> "FullyShardedDataParallelPlugin":
    """FSDP2 as the launcher's variables say, with every weight in the dtype it has.

    A mixed precision policy would cast LoRA, time path and the time step itself; autocast does not.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    where = "the accelerate configuration, fsdp_config"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(f"{where}: fsdp_version must be 2; see configs/accelerate/fsdp2.yaml")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY") != "TRANSFORMER_BASED_WRAP":
        raise InputError(f"{where}: fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP, or no block is sharded alone")
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for key, remedy in {
        "activation_checkpointing": "memory.checkpointing decides",
        "cpu_ram_efficient_loading": "it would broadcast weights that every process has read",
    }.items():
        if getattr(plugin, key):
            raise InputError(f"{where}: fsdp_{key} must be false; {remedy}")
    return plugin


def deepspeed_plugin(config: Config) -> "DeepSpeedPlugin":
    """ZeRO-2 or ZeRO-3 as the launcher's variables say; precision and clipping are filled in from our configuration."""
    if find_spec("deepspeed") is None:
        raise InputError('DeepSpeed is not installed; pip install ".[deepspeed]", or start under FSDP2')
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    if fault := deepspeed_fault(plugin.deepspeed_config):
        raise InputError(f"the DeepSpeed configuration: {fault}; see configs/deepspeed/")
    plugin.deepspeed_config["torch_autocast"] = {
        "enabled": config.train.mixed_precision == "bf16",
        "dtype": "bfloat16",
        # None of the modules that it names: their gradients would be exchanged in bf16.
        "lower_precision_safe_modules": [],
    }
    return plugin


def deepspeed_fault(settings: dict) -> str | None:
    """What in a DeepSpeed configuration the trainer cannot run under, or has another owner."""
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (2, 3):
        return "zero_optimization.stage must be 2 or 3"
    for section in ("optimizer", "scheduler"):
        if section in settings:
            return f"{section} must be left out: the TOML file's [optimizer] decides"
    for section in ("bf16", "fp16"):
        if settings.get(section, {}).get("enabled", False) not in (False, "auto"):
            return f"{section}.enabled must be false: it would cast LoRA and time path; train.mixed_precision decides"
    if settings.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        return "gradient_accumulation_steps must be 1: train.gradient_accumulation decides"
    if settings.get("gradient_clipping", "auto") != "auto":
        return 'gradient_clipping must be "auto": optimizer.gradient_clip decides'
    if not isinstance(settings.get("train_micro_batch_size_per_gpu"), int):
        return "train_micro_batch_size_per_gpu must be a number; 1 will do, the trainer cuts its batches itself"
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return "zero_optimization.offload_optimizer must be left out: DeepSpeed would change the optimizer for its own"
    return None


def home_device(accelerator: Accelerator) -> torch.device:
    """Where an expert is loaded to; engines that shard take it from host memory piece by piece."""
    sharded = engine_name(accelerator) in ("fsdp2", "zero3")
    return torch.device("cpu") if sharded else accelerator.device
