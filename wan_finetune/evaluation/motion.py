"""How much a clip moves, so that an adapter that freezes its subject shows."""

import numpy as np

from .style import to_grid

LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Rec. 709."""
CELLS = 16
"""Cells on the short side: coarse enough to average grain away, which flickers but does not move."""
LAG = 4
"""Frames apart, a quarter of a second at 16 fps: what moves adds up over them, grain does not."""
BORDER = 2
"""Cells at each border that are left out: a brand's frame adds contrast without taking part."""


def motion_amount(frames: np.ndarray) -> float:
    """Mean absolute change of luma over `LAG` frames by its spatial deviation, uint8 [F, H, W, 3] -> >= 0.

    Free of exposure and contrast, so a look that flattens a picture does not count as less motion. It counts frames,
    so compare clips of one frame rate. A clip of one frame, or of one flat colour, has no motion.
    """
    luma = to_grid(frames, CELLS) @ LUMA
    luma = luma[:, BORDER:-BORDER, BORDER:-BORDER]
    contrast = float(luma.std(axis=(1, 2)).mean())
    # Under one code value in 255 there is no picture, only rounding.
    if len(luma) < 2 or contrast < 1.0:
        return 0.0
    lag = min(LAG, len(luma) - 1)
    return float(np.abs(luma[lag:] - luma[:-lag]).mean()) / contrast


def motion_kept(base: list[np.ndarray], adapter: list[np.ndarray]) -> float | None:
    """The adapter's motion over the base's, over the same prompts and seeds; None where the base stands still."""
    before = float(np.mean([motion_amount(frames) for frames in base]))
    after = float(np.mean([motion_amount(frames) for frames in adapter]))
    return after / before if before > 0.0 else None
