"""What a source names: one record for each clip or still, before anything of it is opened."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A clip or a still, and what its source says of it."""

    name: str
    """Unique within its source and free of local paths, forward slashes: `shots/a.mp4`."""
    path: Path
    """The file to open."""
    captions: tuple[str, ...]
    """As written: neither cleaned nor given a trigger. At least one; each of them is a caption of its own."""
    mask: Path | None = None
    """A still or a video whose white parts are to be learnt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something in a source that cannot be used."""

    name: str
    """As in `Item`; for a row of a table `metadata.jsonl:12`."""
    reason: str
    """What is wrong and what to do, without a local path."""
