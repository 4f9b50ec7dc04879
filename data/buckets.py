"""Training sizes: which one a clip takes, and its frames brought to that size."""

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wan_finetune.video import VideoInfo


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One training size: pixels wide and high (multiples of 16), and frames (4n+1)."""

    width: int
    height: int
    num_frames: int

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 16 or self.width % 16 or self.height % 16:
            raise ValueError(f"bucket {self}: width and height must be positive multiples of 16")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            below = max(1, (self.num_frames - 1) // 4 * 4 + 1)
            raise ValueError(f"bucket {self}: frames must be 4n+1, such as {below} or {below + 4}")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """`"832x480x81"` -> Bucket(832, 480, 81). Raises ValueError."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"bucket {text!r} is not WIDTHxHEIGHTxFRAMES, such as 832x480x81")
        return cls(*(int(part) for part in match.groups()))

    @property
    def latent_bytes(self) -> int:
        """Size of Wan's fp32 latent of this bucket: 16 channels, strides 4, 8, 8."""
        return 4 * 16 * (1 + (self.num_frames - 1) // 4) * (self.height // 8) * (self.width // 8)


def choose_bucket(info: VideoInfo, buckets: list[Bucket], fps: float, upscale: bool) -> Bucket | str:
    """The bucket nearest in aspect ratio among those the clip fills in size and duration, the largest of equals.

    Returns the reason, with its remedy, where no bucket fits.
    """
    long_enough = [bucket for bucket in buckets if last_start_seconds(info, bucket, fps) is not None]
    if not long_enough:
        shortest = min(bucket.num_frames for bucket in buckets)
        return (
            f"too short: lasts {info.duration_seconds:.2f} s, the shortest bucket needs more than "
            f"{(shortest - 1) / fps:.2f} s ({shortest} frames at {fps:g} fps); "
            "use a longer clip or a bucket of fewer frames"
        )
    fitting = [b for b in long_enough if upscale or (b.width <= info.width and b.height <= info.height)]
    if not fitting:
        sizes = ", ".join(str(bucket) for bucket in long_enough)
        return (
            f"too small: {info.width}x{info.height} is below every bucket long enough for it ({sizes}); "
            "use a larger clip or a smaller bucket, or set data.upscale = true"
        )
    aspect = info.width / info.height

    def rank(bucket: Bucket) -> tuple[float, int, Bucket]:
        distance = abs(math.log(bucket.width / bucket.height / aspect))
        return round(distance, 9), -bucket.width * bucket.height * bucket.num_frames, bucket

    return min(fitting, key=rank)


def last_start_seconds(info: VideoInfo, bucket: Bucket, fps: float) -> float | None:
    """Time of the last frame at which a window of this bucket can begin; None where the clip is too short."""
    latest = info.duration_seconds - info.tolerance_seconds - (bucket.num_frames - 1) / fps
    starts = info.pts_seconds[info.pts_seconds < latest]
    return float(starts[-1]) if len(starts) else None


def fit_frames(frames: NDArray[np.uint8], bucket: Bucket) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3] scaled to cover the bucket (Lanczos, antialiased) and cropped around the centre.

    Raises:
        ValueError: frames of another shape, or another number of them than the bucket's.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or len(frames) != bucket.num_frames:
        raise ValueError(f"bucket {bucket} needs frames [{bucket.num_frames}, H, W, 3], got {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if (width, height) == (bucket.width, bucket.height):
        return frames
    scale = max(bucket.width / width, bucket.height / height)
    # Cropping in source coordinates, fractions included, keeps the centre where it is and resamples once.
    kept_width, kept_height = min(bucket.width / scale, width), min(bucket.height / scale, height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    size = (bucket.width, bucket.height)
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, box=box)) for frame in frames]
    )
