"""Training sizes, and which one a clip takes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

ASPECTS = (21 / 9, 16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16)
"""Width over height of automatic buckets."""
SHORTEST_AUTO_FRAMES = 17
"""Fewest frames of an automatic bucket for videos: about a second, below which motion is hardly seen."""


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
            raise ValueError(f"bucket {text!r} is not WIDTHxHEIGHTxFRAMES, such as 832x480x81 or auto:832x480x81")
        return cls(*(int(part) for part in match.groups()))

    @property
    def tokens(self) -> int:
        """Length of the denoiser's sequence: one token for 4 frames (the first counts alone) of 16x16 pixels."""
        return (1 + (self.num_frames - 1) // 4) * (self.height // 16) * (self.width // 16)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of Wan's latent: strides 4, 8, 8."""
        return 1 + (self.num_frames - 1) // 4, self.height // 8, self.width // 8

    @property
    def latent_bytes(self) -> int:
        """Size of Wan's fp32 latent of this bucket: 16 channels."""
        return 4 * 16 * math.prod(self.latent_shape)


def parse_buckets(texts: Sequence[str], max_tokens: int | None = None) -> list[Bucket]:
    """Buckets of a configuration, automatic ones spelled out, each once, in the order given.

    Raises:
        ValueError: no bucket, one given twice, or an explicit one beyond `max_tokens`.
    """
    buckets: list[Bucket] = []
    for text in texts:
        if text.startswith("auto:"):
            found = [b for b in automatic_buckets(Bucket.parse(text.removeprefix("auto:")), max_tokens)]
            if not found:
                raise ValueError(f"bucket {text!r}: none is left under max_tokens = {max_tokens}")
            buckets += [bucket for bucket in found if bucket not in buckets]
            continue
        bucket = Bucket.parse(text)
        if max_tokens is not None and bucket.tokens > max_tokens:
            raise ValueError(f"bucket {bucket} has {bucket.tokens} tokens, more than max_tokens = {max_tokens}")
        if bucket in buckets:
            raise ValueError(f"names bucket {bucket} twice")
        buckets.append(bucket)
    return buckets


def automatic_buckets(largest: Bucket, max_tokens: int | None) -> list[Bucket]:
    """Every usual aspect ratio at about the area of `largest`, for its number of frames, halves of it, and stills.

    Sides are multiples of 16, no area is above that of `largest`, no bucket above `max_tokens`.
    """
    area = largest.width * largest.height
    sizes = {(largest.width, largest.height)}
    for aspect in ASPECTS:
        width = max(16, round(math.sqrt(area * aspect) / 16) * 16)
        height = max(16, area // width // 16 * 16)
        sizes.add((width, height))
    lengths = {1, largest.num_frames}
    shorter = largest.num_frames
    while (shorter := (shorter - 1) // 2 // 4 * 4 + 1) >= SHORTEST_AUTO_FRAMES:
        lengths.add(shorter)
    buckets = [Bucket(width, height, frames) for width, height in sizes for frames in lengths]
    return sorted((b for b in buckets if max_tokens is None or b.tokens <= max_tokens), reverse=True)


def choose_bucket(
    width: int, height: int, still: bool, long_enough: Sequence[Bucket], buckets: Sequence[Bucket], upscale: bool
) -> Bucket | str:
    """The bucket for a clip of this size, nearest in aspect ratio and then the largest, among those it fills.

    `long_enough` are those of the buckets that the clip lasts for. A still takes a bucket of one frame; a video does so
    only where it fits no other. Returns the reason, with its remedy, where no bucket fits.
    """
    if still and not any(bucket.num_frames == 1 for bucket in buckets):
        return f"a still needs a bucket of one frame, such as {buckets[0].width}x{buckets[0].height}x1; add it"
    candidates = [b for b in long_enough if not still or b.num_frames == 1]
    fitting = [b for b in candidates if upscale or (b.width <= width and b.height <= height)]
    if not fitting:
        smallest = min(candidates, key=lambda b: (b.width * b.height, b))
        return (
            f"too small: {width}x{height} is below every bucket long enough for it, the smallest of them {smallest}; "
            "use a larger clip or a smaller bucket, or set data.upscale = true"
        )
    aspect = width / height

    def rank(bucket: Bucket) -> tuple[bool, float, int, Bucket]:
        distance = abs(math.log(bucket.width / bucket.height / aspect))
        return bucket.num_frames == 1, round(distance, 9), -bucket.width * bucket.height * bucket.num_frames, bucket

    return min(fitting, key=rank)
