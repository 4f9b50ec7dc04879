"""Black bars around a picture: letterbox, pillarbox, both."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLACK_LEVEL = 32
"""Brightest value of a bar, 0-255: encoders leave up to 4, a wrong range 16, noise the rest."""
BAR_DEVIATION = 3.0
"""Largest standard deviation inside a bar, over place and time. Black in footage is seldom this even."""
SPECKS = 0.01
"""Share of a line's pixels that may be brighter; a subtitle or a channel's logo in a bar is more than that."""
MIN_STEP = 6.0
"""Least step from bar to picture, 0-255, at which a place counts towards the edge."""
PAIR_SHARE = 0.4
"""Share of the edge's length that must show a step where the opposite side has a bar as wide."""
SINGLE_SHARE = 0.9
"""The same for a bar alone on its side: a roof or a horizon under a black sky looks much like it."""
SINGLE_WIDTH = 0.2
"""Widest bar alone on its side, as a share of the picture's."""
MAX_DARK = 0.02
"""Share of the picture that may be black beside a picture's side without being a bar."""
RINGING = 16
"""Pixels beside an edge that compression may disturb: one macroblock."""
MIN_WIDTH = 2
"""Narrowest bar in pixels."""
MIN_REMAINS = 0.2
"""Least share of width and height that is left."""


class Side(NamedTuple):
    """What one side of the picture looks like."""

    dark: int
    """Lines from the border inward that could belong to a bar."""
    width: int
    """Lines from the border to the sharpest step near the end of the dark ones; 0 where there is none."""
    share: float
    """Share of that step's length at which it is one."""


def find_borders(frames: NDArray[np.uint8]) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the picture inside its black bars, in pixels of the frames, exact to two of them.

    Right and bottom are the first column and row outside. None where there are no bars, or nothing but black.

    Takes frames [F, H, W, 3], uint8 RGB, from all over the clip: what is dark in one shows itself in another. Dark
    footage is left alone. A bar is evenly black in all frames and ends in a straight, sharp edge, either along most of
    the picture or at the same distance as on the opposite side.
    """
    brightest = frames.max(axis=3)
    height, width = brightest.shape[1:]
    rows = _look_from_both_sides(brightest)
    columns = _look_from_both_sides(brightest.transpose(0, 2, 1))
    top, bottom = _widths(rows, height, columns, width)
    left, right = _widths(columns, width, rows, height)
    if not (left or top or right or bottom):
        return None
    if width - left - right < MIN_REMAINS * width or height - top - bottom < MIN_REMAINS * height:
        return None
    return left, top, width - right, height - bottom


def _look_from_both_sides(values: NDArray[np.uint8]) -> tuple[Side, Side]:
    """The first and the last of the lines of values [F, lines, along], looked at inward."""
    num_lines = values.shape[1]
    bright, total, squares = np.zeros((3, num_lines))
    for frame in values:  # one at a time: in floating point a clip would take four times its memory
        bright += (frame > BLACK_LEVEL).sum(axis=1)
        total += frame.sum(axis=1, dtype=np.int64)
        squares += np.square(frame, dtype=np.int32).sum(axis=1)
    count = values.shape[0] * values.shape[2]
    deviation = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))
    bar = (bright <= SPECKS * count) & (deviation <= BAR_DEVIATION)
    return _look(values, bar), _look(values[:, ::-1], bar[::-1])


def _look(values: NDArray[np.uint8], bar: NDArray[np.bool_]) -> Side:
    """Look inward from the first line of values [F, lines, along], where bar [lines] tells which could be of a bar."""
    num_lines = len(bar)
    dark = num_lines if bar.all() else int(np.argmin(bar))
    if dark in (0, num_lines):
        return Side(0, 0, 0.0)
    # Compression smears the last lines of a bar, which makes it end too early: the edge is the steepest step nearby.
    first = max(dark - 2, 0)
    profile = values[:, first : dark + RINGING + 1].mean(axis=(0, 2), dtype=np.float64)
    steps = np.diff(profile)
    if len(steps) == 0 or steps.max() <= 0:
        return Side(dark, 0, 0.0)
    steepest = int(np.argmax(steps))
    # A picture that was scaled begins with a line which is half bar.
    if steepest + 1 < len(steps) and steps[steepest + 1] > 0.25 * steps[steepest]:
        steepest += 1
    edge = first + steepest + 1
    if edge < MIN_WIDTH or profile[max(steepest - 1, 0)] > BLACK_LEVEL:
        return Side(dark, 0, 0.0)
    outside = values[:, max(edge - 3, 0)].astype(np.float32)
    inside = values[:, min(edge + 1, num_lines - 1)].astype(np.float32)
    return Side(dark, edge, float(((inside - outside).max(axis=0) >= MIN_STEP).mean()))


def _widths(sides: tuple[Side, Side], length: int, across: tuple[Side, Side], across_length: int) -> tuple[int, int]:
    """Widths of the bars on two opposite sides, 0 for none, given what the sides across look like."""
    if _are_pair(sides, length, SINGLE_SHARE):
        return sides[0].width, sides[1].width
    # A building or a product with straight sides, before nothing but black: it is dark above or below it too.
    on_black = not _are_pair(across, across_length, PAIR_SHARE) and any(
        side.dark > MAX_DARK * across_length and side.share < SINGLE_SHARE for side in across
    )
    if _are_pair(sides, length, PAIR_SHARE) and not on_black:
        return sides[0].width, sides[1].width
    first, last = (
        side.width if side.width <= SINGLE_WIDTH * length and side.share >= SINGLE_SHARE else 0 for side in sides
    )
    return first, last


def _are_pair(sides: tuple[Side, Side], length: int, share: float) -> bool:
    """Whether both sides have a bar, as wide as each other, that ends along this share of its length."""
    one, other = sides
    alike = abs(one.width - other.width) <= max(4, 0.02 * length)
    return bool(one.width and other.width) and alike and min(one.share, other.share) >= share
