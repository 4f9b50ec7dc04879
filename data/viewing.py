"""A window of a clip, as the encoder sees it."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wan_finetune.video import frame_indices

from .buckets import Bucket
from .framing import Box, fit_frames
from .inspection import Inspector


class View(Protocol):
    """What of a file is seen: clips and samples say it."""

    @property
    def path(self) -> Path: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def box(self) -> Box: ...
    @property
    def bucket(self) -> Bucket: ...


def window_frames(view: View, start_seconds: float, fps: float, inspector: Inspector) -> NDArray[np.uint8]:
    """One window: frames [F, H, W, 3] of the view's bucket. Raises VideoFault."""
    info = inspector.info(view.path)
    indices = frame_indices(info, start_seconds=start_seconds, num_frames=view.bucket.num_frames, fps=fps)
    frames = inspector.read(info, indices)
    return fit_frames(frames, view.box, view.bucket, width=view.width, height=view.height)
