"""The [data] table of a configuration file."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from wan_finetune.settings import Settings

from .buckets import Bucket


class SourceConfig(Settings):
    """One folder of clips."""

    path: Path
    """Folder of video files, each with its captions in a .txt file of the same name, one caption a line."""
    make: str | None = None
    """`module:function`, called as function(folder) where the folder does not exist yet: procedural data."""

    @field_validator("make")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError("must be module:function, such as wan_finetune.pocket.world:make_clips")
        return value


class DataConfig(Settings):
    """Which clips to train on, and in which sizes."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Folders of clips, at least one."""
    trigger: str = ""
    """Word that calls the look; put before each caption that does not hold it yet. Empty: none."""
    fps: float = 16.0
    """Frames a second at which clips are sampled; Wan2.2-T2V-A14B makes 16."""
    buckets: list[str] = Field(min_length=1)
    """Training sizes, WIDTHxHEIGHTxFRAMES: multiples of 16 twice, then 4n+1. Each clip takes the one that fits best."""
    windows_per_clip: int = 1
    """Stretches of a bucket's length taken from each clip, evenly spaced from its start to its end."""
    upscale: bool = False
    """Enlarge clips that are smaller than every bucket, at the price of sharpness, instead of leaving them out."""
    caption_dropout: float = 0.05
    """Share of training samples whose caption is replaced by the empty one, for classifier-free guidance."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a faulty clip does: `fail` lists all faults and stops, `skip` leaves them out and says so in the report."""
    cache: Path = Path("cache")
    """Folder of encoded clips and captions; safe to share between runs and to delete."""

    @field_validator("buckets")
    @classmethod
    def _are_buckets(cls, value: list[str]) -> list[str]:
        for text in value:
            Bucket.parse(text)
        if len({str(Bucket.parse(text)) for text in value}) != len(value):
            raise ValueError("names a bucket twice")
        return value

    @field_validator("fps")
    @classmethod
    def _is_a_rate(cls, value: float) -> float:
        if not 0 < value <= 240:
            raise ValueError("must be above 0 and at most 240")
        return value

    @field_validator("windows_per_clip")
    @classmethod
    def _is_positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be 1 or more")
        return value

    @field_validator("caption_dropout")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError("must be in 0..1")
        return value

    @property
    def parsed_buckets(self) -> list[Bucket]:
        """`buckets` as records, in the order given."""
        return [Bucket.parse(text) for text in self.buckets]
