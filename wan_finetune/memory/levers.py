"""Out of memory: telling it from other faults, and what to try next."""

from collections.abc import Mapping

import torch

from .settings import MemorySettings

BEFORE_THE_BASE = "what makes the base smaller needs blocks that are recomputed"
HIDING_TOKENS = 7700
"""From here on PCIe 4 brings a bf16 block before a consumer card has computed one; calculated."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or the host; also where a library wrapped it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, (torch.OutOfMemoryError, MemoryError)):
            return True
        # cuBLAS, cuDNN and the CPU's allocator have no class of their own for it.
        text = str(current)
        if isinstance(current, RuntimeError) and any(
            sign in text
            for sign in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "out of memory", "can't allocate")
        ):
            return True
        current = current.__cause__ or current.__context__
    return False


def next_lever(settings: MemorySettings, bucket: str, num_blocks: int = 40) -> str:
    """What to change when a bucket does not fit: `memory.KEY = VALUE: what it does`, the least costly lever first."""
    policy = settings.policy(bucket)
    if settings.resident == "both" or policy == "offloaded":
        return base_lever(settings, bucket, num_blocks)
    if policy in ("none", "selective"):
        changed = {**settings.checkpointing_by_bucket, bucket: "full"}
        again = "every block" if policy == "none" else "self-attention"
        return f"memory.checkpointing_by_bucket = {table(changed)}: keeps block inputs alone; {again} runs once more"
    changed = {**settings.checkpointing_by_bucket, bucket: "offloaded"}
    return f"memory.checkpointing_by_bucket = {table(changed)}: block inputs wait in the host's memory"


def base_lever(settings: MemorySettings, bucket: str, num_blocks: int = 40) -> str:
    """The same where it is the frozen base that does not fit, whatever the activations of a bucket take."""
    if settings.resident == "both":
        return 'memory.resident = "one": gives back the other expert; it is read again at each change'
    if "none" in settings.checkpointing_by_bucket.values():
        changed = {name: "selective" if p == "none" else p for name, p in settings.checkpointing_by_bucket.items()}
        return f"memory.checkpointing_by_bucket = {table(changed)}: {BEFORE_THE_BASE}"
    if settings.checkpointing == "none":
        return f'memory.checkpointing = "selective": {BEFORE_THE_BASE}'
    streaming, packing = stream_more(settings, num_blocks), pack_more(settings)
    # A long clip's computation hides the copies, which round nothing; a still's does not.
    first, second = (streaming, packing) if tokens(bucket) >= HIDING_TOKENS else (packing, streaming)
    return first or second or f"data.buckets: fewer frames or pixels than {bucket}; every lever of [memory] is pulled"


def stream_more(settings: MemorySettings, num_blocks: int) -> str | None:
    """Half of the blocks, then all."""
    if settings.quantization == "int8" or settings.stream_blocks >= num_blocks:
        return None
    count = num_blocks // 2 if settings.stream_blocks < num_blocks // 2 else num_blocks
    return f"memory.stream_blocks = {count}: so many blocks wait in the host's memory for their turn"


def pack_more(settings: MemorySettings) -> str | None:
    """8 bits, then 4."""
    if settings.quantization == "none":
        if settings.stream_blocks:
            return 'memory.quantization = "fp8": half of the base, rounded to 3 bits of mantissa'
        return 'memory.quantization = "int8": half of the base, with the least rounding; needs the extra `ao`'
    if settings.quantization != "nf4":
        return 'memory.quantization = "nf4": a quarter of the base, with the most rounding; needs the extra `bnb`'
    return None


def table(policies: Mapping[str, str]) -> str:
    """An inline table as TOML has it."""
    return "{ " + ", ".join(f'"{bucket}" = "{policy}"' for bucket, policy in policies.items()) + " }"


def tokens(bucket: str) -> int:
    """Tokens of one clip: patches of 16 x 16 pixels and 4 frames, the first frame alone."""
    width, height, frames = (int(part) for part in bucket.split("x"))
    return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
