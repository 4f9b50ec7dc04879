"""Where in a clip the training windows begin."""

from dataclasses import dataclass

import numpy as np

from wan_finetune.addressing import numpy_rng
from wan_finetune.video import VideoInfo

from .buckets import Bucket
from .config import WindowMode

TOO_SHORT = "too short"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a file, in seconds of presentation time: a shot, or the whole of it."""

    start_seconds: float
    end_seconds: float


def whole(info: VideoInfo) -> Span:
    """All of a file."""
    return Span(0.0, info.duration_seconds)


def possible_starts(info: VideoInfo, span: Span, bucket: Bucket, fps: float) -> np.ndarray:
    """Times of all frames [N], ascending, at which a window of this bucket can begin; empty where none can."""
    latest = span.end_seconds - info.tolerance_seconds - (bucket.num_frames - 1) / fps
    times = info.pts_seconds
    return times[(times >= span.start_seconds - info.tolerance_seconds) & (times < latest)]


def too_short(span: Span, buckets: list[Bucket], fps: float) -> str:
    """Why no bucket fits a span, and what to do."""
    shortest = min(bucket.num_frames for bucket in buckets)
    return (
        f"{TOO_SHORT}: lasts {span.end_seconds - span.start_seconds:.2f} s, the shortest bucket needs more than "
        f"{(shortest - 1) / fps:.2f} s ({shortest} frames at {fps:g} fps); "
        "use a longer clip or a bucket of fewer frames"
    )


def window_starts(
    info: VideoInfo, span: Span, bucket: Bucket, fps: float, mode: WindowMode, count: int, content: str
) -> tuple[float, ...]:
    """Start times in seconds, ascending, each that of a frame; fewer than `count` where there are no more.

    `random` ones are drawn by the clip's `content` (its hash), so that runs of any seed share them in the cache.
    Empty where the span is too short.
    """
    starts = possible_starts(info, span, bucket, fps)
    if len(starts) == 0:
        return ()
    first, last = float(starts[0]), float(starts[-1])
    if mode == "head":
        wanted = np.array([first])
    elif mode == "centre":
        wanted = np.array([(first + last) / 2])
    elif mode == "all":
        length = bucket.num_frames / fps
        wanted = first + length * np.arange(1 + int((last - first) / length + 1e-9))
    elif mode == "random":
        wanted = numpy_rng("windows", content, str(bucket)).uniform(first, last, count)
    else:
        wanted = np.linspace(first, last, count)
    frames = np.searchsorted(starts, wanted + info.tolerance_seconds, side="right") - 1
    return tuple(float(starts[index]) for index in np.unique(np.maximum(frames, 0)))
