"""Video files in and out: with `probing`, `readers` and `stills` the one place that touches a codec.

decord is the reader where it is exact; PyAV, which selects frames by presentation time, reads every other video, and
Pillow the stills. Which of them it is, is settled once per file, because decord's wrong frames come without an error.
"""

import math
import os
import secrets
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from .opening import check_regular
from .probing import probe
from .readers import READERS
from .video_info import Reader, VideoFault, VideoInfo, checked_indices

__all__ = [
    "Reader",
    "VideoFault",
    "VideoInfo",
    "frame_indices",
    "probe",
    "read_frames",
    "read_video",
    "write_video",
]


def frame_indices(info: VideoInfo, *, start_seconds: float, num_frames: int, fps: float) -> NDArray[np.int64]:
    """Indices [num_frames] of the frames on display at start + k / fps, whatever the clip's own rate.

    Raises:
        VideoFault: the clip ends before the last of these times.
    """
    times = start_seconds + np.arange(num_frames) / fps
    if times[0] < 0 or times[-1] >= info.duration_seconds - info.tolerance_seconds:
        raise VideoFault(
            info.path,
            f"needs {num_frames} frames at {fps:g} fps from {start_seconds:g} s, that is until {times[-1]:g} s, "
            f"and lasts {info.duration_seconds:.3f} s; use a longer clip or fewer frames",
        )
    return np.searchsorted(info.pts_seconds, times + info.tolerance_seconds, side="right") - 1


def read_frames(
    info: VideoInfo, indices: NDArray[np.int64], *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3], RGB, as on display, for indices in any order, repeats allowed.

    H and W are the info's: turned, mirrored, and resampled to square pixels where the container asks for it. Matrix and
    range are those that the file states, BT.601 and limited where it states none, converted by FFmpeg's own default,
    which decord has too: 1 of 255 darker than exact arithmetic on average, 3 at most. What is transparent turns white.

    Args:
        out: uint8 [F, H, W, 3] to decode into, instead of a new array.

    Raises:
        VideoFault: the decoder fails, or gives other frames than the file announces.
    """
    indices = checked_indices(info, indices)
    check_regular(info.path)
    if out is None:
        out = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    wanted, rows, inverse = np.unique(indices, return_index=True, return_inverse=True)
    try:
        READERS[info.reader](info, wanted, out, rows)
    except (VideoFault, MemoryError):
        raise
    except Exception as error:
        raise VideoFault(
            info.path, f"{info.reader} cannot decode it ({type(error).__name__}); export it again"
        ) from error
    first_rows = rows[inverse]
    for row in np.flatnonzero(first_rows != np.arange(len(indices))):
        out[row] = out[first_rows[row]]
    return out


def read_video(path: Path) -> tuple[NDArray[np.uint8], float]:
    """All frames [F, H, W, 3], RGB, and their rate in frames a second. Raises VideoFault."""
    info = probe(path)
    return read_frames(info, np.arange(info.num_frames)), info.fps


def write_video(path: Path, frames: NDArray[np.uint8], fps: float, crf: int = 14) -> None:
    """Write frames [F, H, W, 3], RGB, as H.264 (yuv420p, BT.709, closed GOP) in an mp4 that starts before it is loaded.

    Equal frames give equal bytes. The file appears under its name only when it is complete.

    Raises:
        VideoFault: frames of another shape or type, an odd size, or a rate that is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise VideoFault(path, f"frames must be uint8 [F, H, W, 3] with F >= 1, got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoFault(path, f"H.264 needs an even width and height, got {width}x{height}; crop by one pixel")
    if not (math.isfinite(fps) and fps > 0):
        raise VideoFault(path, f"fps must be positive, got {fps}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        _encode(partial, frames, Fraction(fps).limit_denominator(1001), crf)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(path: Path, frames: NDArray[np.uint8], rate: Fraction, crf: int) -> None:
    container_options = {"movflags": "+faststart", "fflags": "+bitexact"}
    # x264's output depends on its number of threads, which by default follows the machine. With its macroblock tree,
    # 20 of 904 encodings of equal frames differed from the rest; without it, none of 248.
    x264 = "open-gop=0:threads=1:lookahead-threads=1:sync-lookahead=0:no-mbtree=1"
    codec_options = {"crf": str(crf), "x264-params": x264, "flags": "+bitexact"}
    with av.open(str(path.absolute()), "w", format="mp4", options=container_options) as container:
        stream = container.add_stream("libx264", rate=rate, options=codec_options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        context = stream.codec_context
        # Without these tags players guess the matrix from the size, and colours shift.
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))
