"""Where in a clip the training windows begin."""

import numpy as np

from wan_finetune.video import VideoInfo

from .buckets import Bucket, last_start_seconds


def window_starts(info: VideoInfo, bucket: Bucket, fps: float, windows_per_clip: int) -> tuple[float, ...]:
    """Start times in seconds, ascending, evenly spaced from the clip's first frame to the last possible start.

    Each is the time of a frame. A clip with fewer possible starts than `windows_per_clip` gives each of them once.
    Empty where the clip is too short.
    """
    last = last_start_seconds(info, bucket, fps)
    if last is None:
        return ()
    even = np.linspace(0.0, last, windows_per_clip)
    frames = np.searchsorted(info.pts_seconds, even + info.tolerance_seconds, side="right") - 1
    return tuple(float(info.pts_seconds[index]) for index in np.unique(frames))
