"""What a few decoded frames say against a clip: black, blank, frozen, a watermark in a corner, a still end card.

Every function takes frames [F, H, W, 3], uint8 RGB, in order of time, from all over the clip: 8 to 16 of them. Black
bars are to be cut off first (`borders.find_borders`), or their edges count as part of the picture.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from wan_finetune.video import VideoInfo, read_frames

Frames = NDArray[np.uint8]
Read = Callable[[VideoInfo, NDArray[np.int64]], Frames]
"""Frames [F, H, W, 3] for indices [F]; raises VideoFault."""
Corner = Literal["top left", "top right", "bottom left", "bottom right"]

BLACK_LEVEL = 24.0
"""Highest mean of a block's channel, 0-255, that counts as black: encoders leave up to 4, a wrong range 16."""
FLAT_RANGE = 10.0
"""Largest difference between the blocks of a picture that shows nothing."""
STILL_CHANGE = 5.0
"""Largest change of a block's luma between frames of one still: noise and compression make up to 2.6 of it."""
SETTLING_CHANGE = 12.0
"""The same for the first frames after a cut, which encoders make worse than those that follow."""
CUT_CHANGE = 8.0
"""Least change of a block's luma that counts towards a cut."""
CUT_SHARE = 0.3
"""Least share of a picture's blocks that a cut changes; someone who leaves the picture changes fewer."""
END_CARD_SECONDS = 0.5
"""Shortest end card."""
END_SECONDS = 6.0
"""How far from the end an end card is looked for at first."""
END_LOOKS = 25
"""Frames looked at over that time."""
EDGE_CONTRAST = 6.0
"""Least difference between a pixel and its surroundings, 0-255, that makes it part of a drawing."""
EDGE_STEADINESS = 6.0
"""Least ratio of a steady pixel's mean contrast to that mean's standard error."""
CORNER_SHARE = 0.02
"""Least share of a corner's pixels that a watermark draws."""
CORNER_RATIO = 4.0
"""Least ratio of that share to the share beside the corner and in the picture as a whole."""
STEADY_SHARE = 0.25
"""Largest share of what is drawn outside the corners that may be steady: beyond it the camera stands still."""
CHANGED_SHARE = 0.6
"""Least share of the blocks outside the corners whose luma changes by `CUT_CHANGE`; with fewer, too much stays."""

GRID = 32
"""Blocks along the longer side: noise averages out in them, a hand that moves does not."""
MIN_BLOCK = 4
"""Smallest block in pixels."""
Stretch = tuple[float, float]
"""Part of the picture's width or height, from one share of it to another."""
FIRST, MIDDLE, LAST = (0.0, 0.25), (0.375, 0.625), (0.75, 1.0)
"""Stretches of the corners, and between them one that a corner's logo does not reach."""
CORNERS: dict[Corner, tuple[Stretch, Stretch]] = {
    "top left": (FIRST, FIRST),
    "top right": (FIRST, LAST),
    "bottom left": (LAST, FIRST),
    "bottom right": (LAST, LAST),
}
"""Rows and columns of each corner."""


def is_black(frames: Frames) -> bool:
    """Whether nothing but black is to be seen in any frame. One lamp in the night makes this False."""
    return all(bool(blocks(frame).max() <= BLACK_LEVEL) for frame in frames)


def is_flat(frames: Frames) -> bool:
    """Whether every frame has one colour throughout, noise aside; the colour may change from frame to frame."""
    return all(bool(np.ptp(blocks(frame), axis=(0, 1)).max() <= FLAT_RANGE) for frame in frames)


def is_frozen(frames: Frames) -> bool:
    """Whether all frames show the same picture, noise and compression aside. False for a single frame, a still."""
    return len(frames) > 1 and bool(np.ptp(_lumas(frames), axis=0).max() <= STILL_CHANGE)


def end_card_start(frames: Frames, times_seconds: NDArray[np.float64]) -> float | None:
    """Time of the first frame of a still picture that stands at the end after a cut; None where there is none.

    A black tail counts with or without a cut. The answer is one of `times_seconds` [F], which ascend and need not be
    even. Something has to move before the card, so a clip that stands still as a whole has none.
    """
    lumas = _lumas(frames)
    start = _first_like_last(lumas)
    if start == 0 or times_seconds[-1] - times_seconds[start] < END_CARD_SECONDS:
        return None
    changed = np.abs(lumas[start] - lumas[start - 1]) >= CUT_CHANGE
    if changed.mean() < CUT_SHARE and not is_black(frames[start:]):
        return None
    return float(times_seconds[start])


def find_end_card(info: VideoInfo, read: Read = read_frames) -> float | None:
    """As `end_card_start` for a whole file, to the frame: looks at its last seconds, and farther back as needed.

    Raises:
        VideoFault: as `read`.
    """
    times = info.pts_seconds
    seconds = END_SECONDS
    while True:
        wanted = np.linspace(max(0.0, times[-1] - seconds), times[-1], END_LOOKS)
        indices = np.unique(np.searchsorted(times, wanted + info.tolerance_seconds, side="right") - 1)
        frames = read(info, indices)
        if _first_like_last(_lumas(frames)) > 0 or indices[0] == 0:
            break
        seconds *= 2
    start = end_card_start(frames, times[indices])
    if start is None:
        return None
    found = int(np.searchsorted(times[indices], start))
    before, first, last = int(indices[found - 1]), int(indices[found]), frames[-1]
    while first - before > 1:
        between = np.unique(np.linspace(before, first, END_LOOKS).round().astype(np.int64))
        found = _first_like_last(_lumas(np.concatenate([read(info, between), last[None]])))
        before, first = int(between[found - 1]), int(between[found])
    return float(times[first])


def static_corners(frames: Frames) -> tuple[Corner, ...]:
    """Corners whose drawing stays while the rest changes, as a watermark's or a channel's logo does.

    Nothing is found where the camera stands still, for then much else stays. Steady lines that go on past a corner are
    those of a frame around the picture.
    """
    if len(frames) < 4:
        return ()
    contrast = np.stack([_contrast(frame) for frame in frames])
    mean, deviation = contrast.mean(axis=0), contrast.std(axis=0, ddof=1)
    drawn = np.sqrt((contrast**2).mean(axis=0)) >= EDGE_CONTRAST
    error = np.maximum(deviation / np.sqrt(len(frames)), 0.25)
    steady = (np.abs(mean) >= EDGE_CONTRAST) & (np.abs(mean) >= EDGE_STEADINESS * error)
    changed = np.ptp(_lumas(frames), axis=0) >= CUT_CHANGE
    if _outside(steady).sum() > STEADY_SHARE * _outside(drawn).sum() or _outside(changed).mean() < CHANGED_SHARE:
        return ()
    found: list[Corner] = []
    for corner, (row, column) in CORNERS.items():
        steady_there = _part(steady, row, column).mean()
        beside = max(_part(steady, row, MIDDLE).mean(), _part(steady, MIDDLE, column).mean(), _outside(steady).mean())
        if steady_there >= max(CORNER_SHARE, CORNER_RATIO * beside):
            found.append(corner)
    return tuple(found)


def _part(values: NDArray[np.bool_], rows: Stretch, columns: Stretch) -> NDArray[np.bool_]:
    """The rectangle of values [H, W] between these shares of height and width."""
    height, width = values.shape
    return values[
        round(rows[0] * height) : round(rows[1] * height), round(columns[0] * width) : round(columns[1] * width)
    ]


def _outside(values: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What lies outside the four corners, as one row."""
    middle, everything = (FIRST[1], LAST[0]), (0.0, 1.0)
    parts = (_part(values, FIRST, middle), _part(values, middle, everything), _part(values, LAST, middle))
    return np.concatenate([part.ravel() for part in parts])


def blocks(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colours [h, w, 3] of a frame [H, W, 3] in square blocks: `GRID` of them along its longer side."""
    height, width = frame.shape[:2]
    scale = min(1.0, GRID / max(width, height), 1 / MIN_BLOCK)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Channel by channel in floating point: whole numbers would round away what is measured here.
    channels = [channel.convert("F").resize(size, Image.Resampling.BOX) for channel in Image.fromarray(frame).split()]
    return np.stack([np.asarray(channel, dtype=np.float32) for channel in channels], axis=2)


def _first_like_last(lumas: NDArray[np.float32]) -> int:
    """Number of the frame from which on all show what the last one does."""
    change = np.abs(lumas - lumas[-1]).max(axis=(1, 2))
    first = len(change) - 1
    while first > 0 and change[first - 1] <= STILL_CHANGE:
        first -= 1
    while first > 0 and change[first - 1] <= SETTLING_CHANGE:
        first -= 1
    return first


def _lumas(frames: Frames) -> NDArray[np.float32]:
    """Luma [F, h, w] of each frame's blocks. Colour is left out: compression shifts it most."""
    return np.stack([blocks(frame) for frame in frames]) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _contrast(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much lighter each pixel is than its surroundings, [h, w], at most 480 pixels wide or high."""
    image = Image.fromarray(frame).convert("L")
    image.thumbnail((480, 480), Image.Resampling.BOX)
    # So narrow that blurred backgrounds, which stay where they are behind a tripod, have none.
    around = image.filter(ImageFilter.GaussianBlur(1.0))
    return np.asarray(image, dtype=np.float32) - np.asarray(around, dtype=np.float32)
