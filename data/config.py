"""The [data] table of a configuration file."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from wan_finetune.settings import Settings

from .buckets import Bucket, parse_buckets

Expert = Literal["high", "low", "single"]
WindowMode = Literal["head", "centre", "uniform", "all", "random"]

RANDOM_WINDOWS = 4
"""Windows that are encoded for `random` where nothing is said."""


class SourceConfig(Settings):
    """Where clips come from. What is left out here is taken from [data]."""

    path: Path | None = None
    """A folder of clips and stills with .txt captions or a metadata table in it; a table (.jsonl, .json, .csv,
    .parquet); WebDataset shards (a .tar file, or a pattern such as shards/{000..007}.tar or shards/*.tar); or a folder
    that `datasets` saved."""
    dataset: str | None = None
    """A dataset of the Hugging Face Hub, user/name; instead of path."""
    subset: str | None = None
    """Configuration of that dataset."""
    revision: str | None = None
    """Commit, tag or branch of that dataset."""
    split: str = "train"
    """Split of a Hub dataset or of one that `datasets` saved."""
    streaming: bool = False
    """Read a Hub dataset row by row instead of downloading it whole first."""
    video_column: str | None = None
    """Column with the clip, where it has an uncommon name."""
    caption_column: str | None = None
    """Column with the caption, where it has an uncommon name."""
    make: str | None = None
    """`module:function`, called as function(folder) where the folder does not exist yet: procedural data."""
    repeats: int | None = Field(None, ge=1, le=10_000)
    """How often an epoch visits each clip; 1 where neither this nor weight is given."""
    weight: float | None = Field(None, gt=0)
    """Share of this source in an epoch, against the weights of the others, whatever their sizes; instead of repeats."""
    loss_weight: float = Field(1.0, gt=0, le=100)
    """Factor of these clips' loss; regularisation sets take less than 1."""
    regularisation: bool = False
    """Clips that the model should keep making as it does: no trigger is put into their captions."""
    experts: tuple[Expert, ...] | None = None
    """Which experts see these clips. Left out: both see videos, the low-noise one alone sees stills."""
    trigger: str | None = None
    """Instead of data.trigger."""
    caption: str | None = None
    """Instead of data.caption."""
    buckets: list[str] | None = Field(None, min_length=1)
    """Instead of data.buckets."""
    windows: WindowMode | None = None
    """Instead of data.windows."""
    windows_per_clip: int | None = Field(None, ge=1, le=1000)
    """Instead of data.windows_per_clip."""
    shots: bool = False
    """Split long footage at its cuts; each shot counts as a clip."""
    crop_borders: bool = False
    """Cut off black bars."""
    cut_end_card: bool = False
    """Cut off a still picture at the end: a logo, a slogan."""
    focus: tuple[float, float] = (0.5, 0.5)
    """What a crop keeps in view: place from left to right and from top to bottom, 0-1."""

    @field_validator("make")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError("must be module:function, such as wan_finetune.pocket.world:make_clips")
        return value

    @field_validator("dataset")
    @classmethod
    def _names_a_repository(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise ValueError("must be user/name")
        return value

    @field_validator("buckets")
    @classmethod
    def _are_buckets(cls, value: list[str] | None) -> list[str] | None:
        return value if value is None else check_buckets(value)

    @field_validator("caption")
    @classmethod
    def _is_a_template(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)

    @field_validator("focus")
    @classmethod
    def _is_a_place(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= part <= 1 for part in value):
            raise ValueError("must be two numbers in 0..1")
        return value

    @field_validator("experts")
    @classmethod
    def _some_experts(cls, value: tuple[Expert, ...] | None) -> tuple[Expert, ...] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError('must be ["high", "low"], ["high"] or ["low"]')
        return value

    @model_validator(mode="after")
    def _is_one_source(self) -> "SourceConfig":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs either path or dataset")
        if self.repeats is not None and self.weight is not None:
            raise ValueError("takes repeats or weight, not both")
        if self.dataset is None and (self.streaming or self.subset or self.revision):
            raise ValueError("streaming, subset and revision are for a dataset of the Hub")
        return self

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.dataset or str(self.path)


class DataConfig(Settings):
    """Which clips to train on, and in which sizes."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Where clips come from, at least one."""
    trigger: str = ""
    """Word that calls the look; put into each caption that does not hold it yet. Empty: none."""
    caption: str = "{trigger}, {caption}"
    """How trigger and caption become one text; with "{caption}, {trigger}" the trigger comes last."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated parts of a caption, the trigger's excepted, anew each time."""
    fps: float = Field(16.0, gt=0, le=240)
    """Frames a second at which clips are sampled; Wan2.2-T2V-A14B makes 16."""
    buckets: list[str] = Field(min_length=1)
    """Training sizes, WIDTHxHEIGHTxFRAMES: multiples of 16 twice, then 4n+1. Each clip takes the one that fits best.
    `auto:AREAxFRAMES`, such as auto:832x480x81, stands for every aspect ratio of about that area."""
    max_tokens: int | None = Field(None, ge=1)
    """Largest bucket in tokens of the denoiser (4x16x16 pixels each); auto buckets keep to it, others are refused."""
    windows: WindowMode = "uniform"
    """Stretches taken from a clip: its `head`, its `centre`, `windows_per_clip` spread from start to end (`uniform`),
    `all` that fit one after another, or `random`: windows_per_clip of them, of which each epoch draws one."""
    windows_per_clip: int | None = Field(None, ge=1, le=1000)
    """How many windows `uniform` and `random` take from each clip; 1 and 4 where this is left out."""
    upscale: bool = False
    """Enlarge clips that are smaller than every bucket, at the price of sharpness, instead of leaving them out."""
    caption_dropout: float = Field(0.05, ge=0, le=1)
    """Share of training samples whose caption is replaced by the empty one, for classifier-free guidance."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a faulty clip does: `fail` lists all faults and stops; `skip` leaves it out and says so in the report, and
    stops where more than one in twenty is faulty."""
    decode_timeout_seconds: float = Field(60.0, gt=0)
    """How long one file may keep a decoder busy before it counts as faulty."""
    latent_std: bool = False
    """Keep the standard deviation of the latents in the cache as well, for losses that sample them; training uses the
    mean."""
    cache: Path = Path("cache")
    """Folder of encoded clips and captions; safe to share between runs and to delete."""

    @field_validator("buckets")
    @classmethod
    def _are_buckets(cls, value: list[str]) -> list[str]:
        return check_buckets(value)

    @field_validator("caption")
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        return check_template(value)

    @model_validator(mode="after")
    def _buckets_keep_to_the_budget(self) -> "DataConfig":
        for source in self.sources:
            self.buckets_of(source)
        return self

    @model_validator(mode="after")
    def _random_windows_can_be_drawn(self) -> "DataConfig":
        for source in self.sources:
            if self.windows_of(source) == ("random", 1):
                raise ValueError(
                    f'windows = "random" draws among windows_per_clip windows, and of {source.title} there is only 1; '
                    "set windows_per_clip to 2 or more, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _some_source_shows_the_look(self) -> "DataConfig":
        if all(source.regularisation for source in self.sources):
            raise ValueError("every source is a regularisation set; one must show the look that is to be learnt")
        return self

    def windows_of(self, source: SourceConfig) -> tuple[WindowMode, int]:
        """Mode and number of the windows of a source's clips."""
        mode = source.windows or self.windows
        return mode, source.windows_per_clip or self.windows_per_clip or (RANDOM_WINDOWS if mode == "random" else 1)

    def buckets_of(self, source: SourceConfig) -> list[Bucket]:
        """The buckets that a source's clips may take, automatic ones spelled out."""
        return parse_buckets(source.buckets or self.buckets, self.max_tokens)


def check_buckets(value: list[str]) -> list[str]:
    """The same list; raises ValueError for a bucket that is none, or one given twice."""
    parse_buckets(value)
    return value


def check_template(value: str) -> str:
    """The same text; raises ValueError where it does not say where the caption goes."""
    if value.count("{caption}") != 1 or value.count("{trigger}") > 1:
        raise ValueError("must hold {caption} once, and {trigger} at most once")
    return value
