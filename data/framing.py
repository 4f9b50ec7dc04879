"""From a picture of any size to a bucket's: what is cropped away, and one antialiased resampling."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .buckets import Bucket


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the picture on display; fractions are meant."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


def crop_box(content: Box, bucket: Bucket, focus: tuple[float, float]) -> Box:
    """The largest part of `content` with the bucket's aspect ratio, as near to `focus` (shares of it) as it goes."""
    scale = max(bucket.width / content.width, bucket.height / content.height)
    width, height = min(bucket.width / scale, content.width), min(bucket.height / scale, content.height)
    left = content.left + min(max(focus[0] * content.width - width / 2, 0.0), content.width - width)
    top = content.top + min(max(focus[1] * content.height - height / 2, 0.0), content.height - height)
    return Box(left, top, left + width, top + height)


def lost_area(box: Box, width: int, height: int) -> float:
    """Share of a picture, 0-1, that lies outside `box`."""
    return 1.0 - box.width * box.height / (width * height)


def fit_frames(frames: NDArray[np.uint8], box: Box, bucket: Bucket, *, width: int, height: int) -> NDArray[np.uint8]:
    """The part of frames [F, H, W, 3] or [F, H, W] inside `box`, at the bucket's size (Lanczos, antialiased).

    `width` and `height` are the picture's size on display, in which `box` is given; frames of oblong pixels have
    another. Cropping in fractions of a pixel resamples once and keeps the centre where it is.

    Raises:
        ValueError: another number of frames than the bucket's.
    """
    if frames.ndim not in (3, 4) or len(frames) != bucket.num_frames:
        raise ValueError(f"bucket {bucket} needs frames [{bucket.num_frames}, H, W, 3], got {list(frames.shape)}")
    x, y = frames.shape[2] / width, frames.shape[1] / height
    inner = (box.left * x, box.top * y, min(box.right * x, frames.shape[2]), min(box.bottom * y, frames.shape[1]))
    size = (bucket.width, bucket.height)
    if inner == (0.0, 0.0, *size) and frames.shape[1:3] == (bucket.height, bucket.width):
        return frames
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, box=inner)) for frame in frames]
    )
