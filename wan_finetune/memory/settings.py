"""The [memory] table."""

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..settings import Settings

Quantization = Literal["none", "fp8", "int8", "nf4"]
Policy = Literal["none", "selective", "full", "offloaded"]
Resident = Literal["one", "both"]


class MemorySettings(Settings):
    """What is traded for memory. `docs/memory.md` says what each lever brings and costs."""

    quantization: Quantization = "none"
    """How the frozen base's block Linears are stored: fp8, int8 (extra `ao`) or nf4 (extra `bnb`); LoRA stays fp32."""
    checkpointing: Policy = "full"
    """What the backward pass has at hand. `none`: all activations. `selective`: each block's input and its
    self-attention's output, the rest recomputed. `full`: inputs alone. `offloaded`: inputs, in the host's memory."""
    checkpointing_by_bucket: Mapping[str, Policy] = Field(default_factory=dict)
    """Another policy for some buckets, such as { "832x480x81" = "full" }."""
    stream_blocks: int = Field(0, ge=0)
    """Blocks that live in the host's memory and come to the device when their turn is near."""
    resident: Resident = "one"
    """How many of the frozen experts stay on the device: the one in training, or both, so that none is read again."""

    @field_validator("checkpointing_by_bucket")
    @classmethod
    def names_buckets(cls, value: Mapping[str, Policy]) -> Mapping[str, Policy]:
        for bucket in value:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", bucket):
                raise ValueError(f"{bucket!r} is no bucket; write width x height x frames, such as 832x480x81")
        return value

    @model_validator(mode="after")
    def hangs_together(self) -> "MemorySettings":
        keeps_all = "none" in self.policies
        if keeps_all and self.quantization in ("fp8", "int8"):
            raise ValueError(
                f'quantization = "{self.quantization}" unpacks each weight for its use, and checkpointing = "none" '
                'would keep all that is unpacked until the backward pass; use "selective", or quantization = "nf4"'
            )
        if keeps_all and self.stream_blocks:
            raise ValueError(
                'stream_blocks needs blocks that are recomputed: with checkpointing = "none" the backward pass would '
                'find weights that have left the device; use "selective", "full" or "offloaded"'
            )
        if self.resident == "both" and self.stream_blocks:
            raise ValueError('resident = "both" with stream_blocks: where one expert does not fit, two do not')
        return self

    @property
    def policies(self) -> set[Policy]:
        """Every checkpointing policy that may be in use."""
        return {self.checkpointing, *self.checkpointing_by_bucket.values()}

    def policy(self, bucket: str) -> Policy:
        """The checkpointing policy of a bucket's steps."""
        return self.checkpointing_by_bucket.get(bucket, self.checkpointing)
