"""From sources to clips: each with its captions, bucket and windows, or the reason why it is left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from wan_finetune.captions import compose, settle
from wan_finetune.video import VideoInfo

from .buckets import Bucket, choose_bucket
from .captions import variants
from .config import DataConfig, SourceConfig
from .framing import Box, crop_box, lost_area
from .inspection import Inspected, Inspector
from .items import Fault, Item
from .sources import read_source
from .windows import TOO_SHORT, Span, possible_starts, too_short, window_starts

TAG_ORDERS = 4
"""How many orders of a caption's tags are encoded where they are shuffled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A file, or a shot of it, that is trained on."""

    name: str
    """As in `Item`, with the shot's number where the file was split."""
    path: Path
    sha256: str
    """Of the file's bytes."""
    source: int
    """Number of its source in the configuration."""
    still: bool
    """Whether it shows no motion: an image, or a video that fills a bucket of one frame alone."""
    width: int
    """On display, in pixels."""
    height: int
    box: Box
    """What of the picture the bucket shows."""
    bucket: Bucket
    span: Span
    """What of the file it is."""
    start_seconds: tuple[float, ...]
    """Where its windows begin, ascending; at least one."""
    written: tuple[str, ...]
    """Its captions as the source has them, one for each of `captions`."""
    captions: tuple[tuple[str, ...], ...]
    """At least one; each in all orders of its tags that are used; cleaned, trigger included."""
    mask: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of data_report.jsonl: a clip, and what became of it."""

    file: str
    """Name within its source, so that the report leaks no local path."""
    source: int
    """Number of its source in the configuration, from 0."""
    used: bool
    bucket: str | None = None
    windows: tuple[float, ...] = ()
    """Start times in seconds."""
    reader: str | None = None
    captions: tuple[str, ...] = ()
    lost_area: float | None = None
    """Share of the picture that the bucket crops away, 0-1."""
    reason: str | None = None
    """Fault and remedy where it is not used."""
    fault: bool = False
    """Whether there is something to mend; a shot that is shorter than every bucket is merely passed over."""

    def to_json(self) -> str:
        """One line, keys in a fixed order, Chinese left readable."""
        # Not `asdict`, which copies each value: there is a line for each of up to a million clips.
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}, ensure_ascii=False)


def find_clips(config: DataConfig, inspector: Inspector) -> Iterator[tuple[Row, Clip | None]]:
    """A row for everything that the sources name, in order, and the clip where there is one.

    Raises:
        InputError: a whole source is unusable.
    """
    for number, source in enumerate(config.sources):
        for item in read_source(source, config.cache / "media"):
            if isinstance(item, Fault):
                yield Row(file=item.name, source=number, used=False, reason=item.reason, fault=True), None
                continue
            found = inspector.inspect(item.path, source)
            if isinstance(found, str):
                yield Row(file=item.name, source=number, used=False, reason=found, fault=True), None
                continue
            for index, span in enumerate(found.spans):
                name = item.name if len(found.spans) == 1 else f"{item.name}#{index + 1}"
                clip = make_clip(item, name, found, span, number, config)
                if isinstance(clip, str):
                    fault = len(found.spans) == 1 or not clip.startswith(TOO_SHORT)
                    reader = found.info.reader
                    yield Row(file=name, source=number, used=False, reader=reader, reason=clip, fault=fault), None
                else:
                    yield row_of(clip, found.info), clip


def make_clip(item: Item, name: str, found: Inspected, span: Span, number: int, config: DataConfig) -> Clip | str:
    """A clip with its bucket, windows and captions, or the reason, with its remedy, why it cannot be used."""
    source, info = config.sources[number], found.info
    composed = compose_captions(item.captions, source, config)
    if not composed:
        return "its caption is empty; describe the clip in it"
    buckets = config.buckets_of(source)
    long_enough = [b for b in buckets if len(possible_starts(info, span, b, config.fps))]
    if not long_enough:
        return too_short(span, buckets, config.fps)
    bucket = choose_bucket(
        round(found.content.width), round(found.content.height), info.is_still, long_enough, buckets, config.upscale
    )
    if isinstance(bucket, str):
        return bucket
    mode, count = config.windows_of(source)
    return Clip(
        name=name,
        path=item.path,
        sha256=found.sha256,
        source=number,
        still=bucket.num_frames == 1,
        width=info.width,
        height=info.height,
        box=crop_box(found.content, bucket, source.focus),
        bucket=bucket,
        span=span,
        start_seconds=window_starts(info, span, bucket, config.fps, mode, count, found.sha256),
        written=tuple(composed),
        captions=tuple(composed.values()),
        mask=item.mask,
    )


def compose_captions(raw: tuple[str, ...], source: SourceConfig, config: DataConfig) -> dict[str, tuple[str, ...]]:
    """What the text encoder is given for each of an item's captions that says anything."""
    trigger, template = trigger_of(source, config), source.caption or config.caption
    orders = TAG_ORDERS if config.shuffle_tags else 1
    return {
        caption: variants(compose(caption, trigger, template), trigger, orders, seed=0)
        for caption in raw
        if settle(caption)
    }


def trigger_of(source: SourceConfig, config: DataConfig) -> str:
    """The trigger of a source's captions; regularisation sets have none."""
    return "" if source.regularisation else (config.trigger if source.trigger is None else source.trigger)


def row_of(clip: Clip, info: VideoInfo) -> Row:
    """The report's line for a clip."""
    return Row(
        file=clip.name,
        source=clip.source,
        used=True,
        bucket=str(clip.bucket),
        windows=clip.start_seconds,
        reader=info.reader,
        captions=tuple(orders[0] for orders in clip.captions),
        lost_area=round(lost_area(clip.box, clip.width, clip.height), 4),
    )
