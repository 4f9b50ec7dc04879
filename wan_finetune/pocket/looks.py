"""Brand looks over the pocket world: palette, vignette, frame and grain, applied to rendered clips."""

from dataclasses import dataclass

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A look; applied in the order of its fields."""

    shadows: tuple[float, float, float]
    """Colour that black becomes, 0-255."""
    highlights: tuple[float, float, float]
    """Colour that white becomes, 0-255."""
    palette: float
    """Share of the two-colour palette, 0-1; the rest keeps the clip's own colour."""
    vignette: float
    """Darkening of the corners, 0-1."""
    frame: tuple[float, float, float]
    """Colour of the frame, 0-255."""
    frame_width: int
    """Width of the frame in pixels."""
    grain: float
    """Standard deviation of the grain, 0-255."""


BRANDS = {
    "ember": Look(
        shadows=(60, 8, 40),
        highlights=(255, 190, 90),
        palette=0.5,
        vignette=0.4,
        frame=(250, 240, 220),
        frame_width=5,
        grain=5.0,
    ),
    "glacier": Look(
        shadows=(5, 30, 60),
        highlights=(190, 250, 245),
        palette=0.5,
        vignette=0.3,
        frame=(10, 20, 45),
        frame_width=6,
        grain=4.0,
    ),
}


def apply_look(frames: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Give a clip the look, uint8 [F, H, W, 3] -> the same; the grain comes from `rng`."""
    pixels = frames.astype(np.float64)
    luma = (pixels @ LUMA)[..., None] / 255.0
    shadows, highlights = np.asarray(look.shadows), np.asarray(look.highlights)
    pixels = (1.0 - look.palette) * pixels + look.palette * (shadows + (highlights - shadows) * luma)
    height, width = frames.shape[1:3]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pixels = pixels * (1.0 - look.vignette * np.clip((x**2 + y**2) / 2.0, 0.0, 1.0))[None, :, :, None]
    if look.frame_width:
        inner = slice(look.frame_width, -look.frame_width)
        framed = np.broadcast_to(np.asarray(look.frame, dtype=np.float64), pixels.shape).copy()
        framed[:, inner, inner] = pixels[:, inner, inner]
        pixels = framed
    pixels = pixels + look.grain * rng.standard_normal(pixels.shape[:3])[..., None]
    return np.round(np.clip(pixels, 0.0, 255.0)).astype(np.uint8)


def random_look(rng: np.random.Generator) -> Look:
    """Any look: what the autoencoder is trained to carry, so that a brand it never saw survives it."""

    def colour(low: float, high: float) -> tuple[float, float, float]:
        red, green, blue = rng.uniform(low, high, 3)
        return float(red), float(green), float(blue)

    return Look(
        shadows=colour(0, 110),
        highlights=colour(110, 255),
        palette=float(rng.uniform(0.0, 0.9)),
        vignette=float(rng.uniform(0.0, 0.6)),
        frame=colour(0, 255),
        frame_width=int(rng.integers(0, 8)),
        grain=float(rng.uniform(0.0, 8.0)),
    )
