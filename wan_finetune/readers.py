"""The three ways to get frames: decord where it is exact, PyAV for every other video, Pillow for stills.

Each takes the indices `wanted` [N], ascending and different, and decodes number k of them into `out[rows[k]]`, where
`out` is [F, H, W, 3], uint8, RGB. Memory stays at that of `out` and a few frames.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .opening import open_container
from .stills import read_still
from .video_info import Reader, VideoFault, VideoInfo

Indices = NDArray[np.int64]
Frames = NDArray[np.uint8]

DECORD_FRAMES = 8
"""How many frames decord hands over at once, so that a clip is not held twice."""

SEEK_FRAMES = 8
"""A seek pays where it saves decoding more frames than this."""


class _Batch:
    """decord's frames as numpy takes them without a copy."""

    def __init__(self, frames: Any) -> None:
        self.frames = frames

    def __dlpack__(self, **_: object) -> Any:
        return self.frames.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def read_decord(info: VideoInfo, wanted: Indices, out: Frames, rows: Indices) -> None:
    """Raises VideoFault or decord's own errors."""
    import decord

    # Opened per call: a live reader that a forked worker inherits aborts or hangs it.
    reader = decord.VideoReader(str(info.path.absolute()), num_threads=1)
    for first in range(0, len(wanted), DECORD_FRAMES):
        part = slice(first, first + DECORD_FRAMES)
        frames = np.from_dlpack(_Batch(reader.get_batch(wanted[part].tolist())))
        _check_size(info, frames.shape[2], frames.shape[1])
        out[rows[part]] = frames


def read_pillow(info: VideoInfo, wanted: Indices, out: Frames, rows: Indices) -> None:
    """Raises VideoFault."""
    picture = read_still(info.path)
    _check_size(info, picture.shape[1], picture.shape[0])
    out[rows[0]] = picture


def read_pyav(info: VideoInfo, wanted: Indices, out: Frames, rows: Indices) -> None:
    """Seeks where time stamps can be trusted, and counts from the start where that gives less than was wanted.

    Raises VideoFault or PyAV's own errors.
    """
    missing = dict(zip(wanted.tolist(), rows.tolist(), strict=True))
    show = _painter(info)
    runs = list(_runs(info, wanted))
    if info.ticks is not None and (len(runs) > 1 or wanted[0] > 0):
        with open_container(info.path) as container:
            for run in runs:
                _collect(container, info, run, missing, out, show, seek=True)
    if missing:
        with open_container(info.path) as container:
            _collect(container, info, list(missing), missing, out, show, seek=False)
    if missing:
        raise VideoFault(
            info.path, f"{len(missing)} frames cannot be decoded, the first is number {min(missing)}; export it again"
        )


def _runs(info: VideoInfo, wanted: Indices) -> Iterator[list[int]]:
    """The wanted indices in stretches: each is decoded in one go, and before each a seek pays."""
    keys = np.zeros(1, np.int64) if info.key_frames is None else info.key_frames
    before = np.searchsorted(keys, wanted, side="right") - 1
    starts = np.where(before >= 0, keys[np.maximum(before, 0)], 0)
    breaks = np.flatnonzero(starts[1:] - wanted[:-1] > SEEK_FRAMES) + 1
    yield from (part.tolist() for part in np.split(wanted, breaks))


def _collect(
    container: Any,
    info: VideoInfo,
    run: list[int],
    missing: dict[int, int],
    out: Frames,
    show: Callable[[Any], Frames],
    *,
    seek: bool,
) -> None:
    """Decode from the key frame before the first of a run, or from the start, until all of the run are found.

    What is found goes out of `missing`, which tells each index its row.
    """
    ticks = info.ticks
    due = {int(ticks[index]) if ticks is not None else index: index for index in run}
    last = max(due)
    stream = container.streams.best("video")
    if seek:
        container.seek(min(due), stream=stream, backward=True)
    # Pictures that lead the key frame a seek lands on may refer to frames that were never decoded.
    usable = not seek
    for count, frame in enumerate(container.decode(stream)):
        usable = usable or frame.key_frame
        position = count if ticks is None else frame.pts
        if usable and not frame.is_corrupt and position in due:
            _check_size(info, frame.width, frame.height)
            out[missing.pop(due.pop(position))] = show(frame)
        if not due or (seek and position is not None and position > last):
            break


def _painter(info: VideoInfo) -> Callable[[Any], Frames]:
    """Function from a decoded frame to its pixels [H, W, 3] on display."""
    from av.video.reformatter import Interpolation, VideoReformatter

    # One for all frames: making its tables anew for each costs more than the conversion of a small frame.
    reformatter = VideoReformatter()
    turns = info.rotation_degrees // 90
    width, height = (info.height, info.width) if turns % 2 else (info.width, info.height)
    stored = info.stored_size or (width, height)
    # Unscaled, each of these gives the same bytes, those of FFmpeg's default and of decord.
    interpolation = Interpolation.BILINEAR if stored == (width, height) else Interpolation.BICUBIC

    def show(frame: Any) -> Frames:
        see_through = any(component.is_alpha for component in frame.format.components)
        converted = reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgba" if see_through else "rgb24",
            interpolation=interpolation,
            threads=1,
        )
        pixels: Any = converted.to_ndarray()
        if see_through:
            alpha = pixels[..., 3:].astype(np.uint16)
            pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.rot90(pixels[:, ::-1] if info.mirrored else pixels, turns)

    return show


def _check_size(info: VideoInfo, width: int, height: int) -> None:
    due = info.stored_size or (info.width, info.height)
    if (width, height) != due:
        raise VideoFault(
            info.path,
            f"a frame is {width}x{height} where {due[0]}x{due[1]} was due: damaged, or its size changes; "
            "export it again",
        )


READERS: dict[Reader, Callable[[VideoInfo, Indices, Frames, Indices], None]] = {
    "decord": read_decord,
    "pyav": read_pyav,
    "pillow": read_pillow,
}
