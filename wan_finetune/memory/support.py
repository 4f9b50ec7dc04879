"""Which combinations of quantisation, engine, precision, streaming and kind of adapter train rightly. All others are
refused, with the reason, because most of them would go wrong without a word.

Supported means: shown by a test on the CPU, with the reasons below read in the packages' code. No GPU has run any.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InputError
from .settings import Quantization

Engine = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
Precision = Literal["no", "bf16", "fp16"]
BaseDtype = Literal["bfloat16", "float32"]
Adaptation = Literal["lora", "dora", "pissa", "olora"]
"""Plain LoRA; DoRA; or LoRA that starts from directions of the base and takes them out of it."""

SHARDED: tuple[Engine, ...] = ("fsdp2", "zero3")
FROM_BASE: tuple[Adaptation, ...] = ("pissa", "olora")


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """What is to run together."""

    quantization: Quantization = "none"
    engine: Engine = "single"
    precision: Precision = "bf16"
    dtype: BaseDtype = "bfloat16"
    """Of the base, before quantisation: model.dtype."""
    streaming: bool = False
    adaptation: Adaptation = "lora"
    kept: bool = False
    """Whether the base stays on the device from one stretch to the next: memory.resident = "both"."""


def refusal(wanted: Combination) -> str | None:
    """Why a combination is not supported, as key, reason and remedy; None where it is."""
    kind, engine = wanted.quantization, wanted.engine
    if wanted.precision == "fp16":
        return (
            'train.mixed_precision = "fp16": Wan was trained in bf16 and its activations leave the range of fp16; '
            'use "bf16", or "no" on cards without it'
        )
    if wanted.precision == "no" and wanted.dtype == "bfloat16":
        return (
            'train.mixed_precision = "no" with model.dtype = "bfloat16": inputs in fp32 would meet weights in bf16; '
            'use mixed_precision = "bf16", or model.dtype = "float32"'
        )
    if kind != "none" and engine in SHARDED:
        return (
            f'memory.quantization = "{kind}" under {engine}: it cuts weights into shards, and cuts packed ones without '
            'their scales; use quantization = "none" under this engine, or DDP with a quantised base on each GPU'
        )
    if kind != "none" and engine == "zero2":
        return (
            f'memory.quantization = "{kind}" under zero2: DeepSpeed sends every parameter to all processes, and packed '
            "ones have not been shown to arrive whole; use DDP, which needs 1 to 2 GiB more for the optimizer"
        )
    if wanted.streaming and engine not in ("single", "ddp"):
        return (
            f"memory.stream_blocks under {engine}: it places the weights itself; use stream_blocks = 0, or one process "
            "or DDP"
        )
    if wanted.streaming and kind == "int8":
        return (
            'memory.stream_blocks with memory.quantization = "int8": torchao\'s tensors cannot change their memory; '
            'use "fp8" or "nf4", or stream_blocks = 0'
        )
    return refused_adaptation(wanted)


def refused_adaptation(wanted: Combination) -> str | None:
    """The part of `refusal` that is about kinds of adapters."""
    kind, engine = wanted.quantization, wanted.engine
    if wanted.adaptation in FROM_BASE:
        name = f'lora.initialisation = "{wanted.adaptation}"'
        if kind != "none":
            return (
                f'{name} with memory.quantization = "{kind}": it takes directions out of the base, and packed weights '
                'have no room for what is left; use memory.quantization = "none", or another initialisation'
            )
        if engine in SHARDED:
            return f"{name} under {engine}: it changes the base before that is cut into shards; use one process or DDP"
        if wanted.kept:
            return (
                f'{name} with memory.resident = "both": it changes the base, and the second stretch would start from '
                'the changed one; use resident = "one"'
            )
    if wanted.adaptation == "dora":
        if kind in ("fp8", "int8"):
            return (
                f'lora.dora with memory.quantization = "{kind}": it needs each weight\'s norm in every step, and PEFT '
                'unpacks those of nf4 alone; use "nf4" or "none", or plain LoRA'
            )
        if engine in SHARDED:
            return f"lora.dora under {engine}: it reads whole weights, and finds a shard; use one process or DDP"
    return None


def check_supported(wanted: Combination) -> None:
    """Whether a combination may run.

    Raises:
        InputError: naming the key, the reason and the remedy.
    """
    if reason := refusal(wanted):
        raise InputError(reason)


def every_combination() -> list[Combination]:
    """The whole table."""
    return [
        Combination(
            quantization=quantization,
            engine=engine,
            precision=precision,
            dtype=dtype,
            streaming=streaming,
            adaptation=adaptation,
            kept=kept,
        )
        for quantization in get_args(Quantization)
        for engine in get_args(Engine)
        for precision in get_args(Precision)
        for dtype in get_args(BaseDtype)
        for streaming, kept in ((False, False), (True, False), (False, True))
        for adaptation in get_args(Adaptation)
    ]
