"""How near clips are to a brand's look: a descriptor per clip, and distances between sets of clips.

The descriptor reads colour, tone, borders and grain and knows nothing of what is shown. Its scale is fixed (CIE Lab
units times stated weights), so that a distance measured today compares with one measured on other clips next month.
Every number is read from areas relative to the picture's short side, so 64x64 and 832x480 footage share one ruler.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MAX_FRAMES = 16
"""Frames read from a clip, evenly spread: a look is the same in all of them."""
GRID = 64
"""Short side, in cells, of the grid that every statistic but the finest grain is read from."""
CORE = 8
"""Cells at each border that colour and tone leave out, so that a frame is counted once, under `edge`."""
RINGS = (0, 2, 4, 6, 10, 16, GRID // 2)
"""Edges of the concentric border rings, in cells from the border."""
TONES = (20.0, 50.0, 80.0)
"""Lightness of shadows, midtones and highlights, at which the tint is read."""
TONE_WIDTH = 15.0
"""Standard deviation of the window around each tone, in lightness."""
LIGHTNESS = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Quantiles of lightness: black level, tone curve, white level."""
TINT_PRIOR = 0.1
"""Weight of the clip's mean tint, as a share of its cells, where a tone hardly occurs or only in one object."""

WEIGHTS = {"tint": 1.0, "palette": 1.0, "tone": 0.5, "edge": 1.0, "texture": 2.0}
"""What a group counts for, per root mean square of its differences in Lab units. Tone is mostly content, so it counts
half; grain is a few Lab units where colour is tens, so texture counts double and still cannot dominate."""

# Linear sRGB to CIE XYZ under D65 (IEC 61966-2-1), each row divided by the white point.
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
RGB_TO_XYZ /= RGB_TO_XYZ.sum(axis=1, keepdims=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniformity:
    """How evenly a set of clips carries the look."""

    mean: float
    """Mean nearness, descriptor units."""
    spread: float
    """Standard deviation of nearness, descriptor units; 0.0 for a single clip."""
    worst: float
    """Nearness of the clip farthest from the brand."""
    worst_index: int
    """Its place in the samples."""


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3], 0-255, to CIE Lab under D65 [..., 3]; L is 0-100 (IEC 61966-2-1, CIE 15:2004)."""
    code = np.asarray(rgb, dtype=np.float64) / 255.0
    linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def box_weights(size: int, cells: int) -> np.ndarray:
    """Rows that average `size` pixels into `cells` equal boxes, [cells, size]; a pixel on a seam is shared."""
    seams = np.linspace(0.0, size, cells + 1)[:, None]
    pixel = np.arange(size)
    overlap = np.minimum(seams[1:], pixel + 1) - np.maximum(seams[:-1], pixel)
    return np.asarray(np.clip(overlap, 0.0, None) * cells / size)


def to_grid(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Average frames [F, H, W, 3] into square cells, `short_side` of them on the short side; float64 [F, h, w, 3]."""
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    rows = box_weights(height, max(1, round(height * scale)))
    columns = box_weights(width, max(1, round(width * scale)))
    # A frame at a time: 81 frames of 832x480 in float64 would be 776 MB.
    return np.stack([np.einsum("hy,yxc->hxc", rows, columns @ frame.astype(np.float64)) for frame in frames])


def border_depth(height: int, width: int) -> np.ndarray:
    """Cells between each cell and the nearest border, int [H, W]."""
    rows, columns = np.arange(height), np.arange(width)
    return np.minimum.outer(np.minimum(rows, rows[::-1]), np.minimum(columns, columns[::-1]))


def grain(lightness: np.ndarray) -> float:
    """Robust standard deviation of detail too fine for edges, [F, H, W] -> lightness units.

    Immerkaer's kernel (1996, Fast noise variance estimation), which cancels on gradients and straight edges; the
    median in place of the mean lets what the clip shows count for little.
    """
    across = lightness[:, :, 2:] - 2.0 * lightness[:, :, 1:-1] + lightness[:, :, :-2]
    detail = across[:, 2:] - 2.0 * across[:, 1:-1] + across[:, :-2]
    return float(np.median(np.abs(detail))) / (6.0 * 0.6745)


def look_groups(frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The descriptor's groups before weighting: (name, values in Lab units)."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(MAX_FRAMES, len(frames))).round().astype(int))]
    cells = to_lab(to_grid(chosen, GRID))
    depth = border_depth(*cells.shape[1:3])
    core = cells[:, depth >= CORE].reshape(-1, 3)
    lightness, chroma = core[:, 0], core[:, 1:]
    mean_tint = chroma.mean(axis=0)

    window = np.exp(-0.5 * ((lightness - np.array(TONES)[:, None]) / TONE_WIDTH) ** 2)
    prior = TINT_PRIOR * len(core)
    tints = (window @ chroma + prior * mean_tint) / (window.sum(axis=1, keepdims=True) + prior)
    yield "tint", tints.ravel()
    yield "palette", np.concatenate([mean_tint, chroma.std(axis=0), [np.hypot(*chroma.T).mean()]])
    yield "tone", np.concatenate([np.quantile(lightness, LIGHTNESS), [lightness.std()]])

    rings = [cells[:, (depth >= inner) & (depth < outer)].reshape(-1, 3) for inner, outer in itertools.pairwise(RINGS)]
    means = np.stack([ring.mean(axis=0) for ring in rings])
    # The outer rings as they are, since a frame has a colour; all against the middle, since a vignette has none.
    falloff = means[:-1, 0] - means[-1, 0]
    spread = [ring.std(axis=0).mean() for ring in rings[:3]]
    yield "edge", np.concatenate([means[:3].ravel(), falloff, spread])

    pixels_differ = min(frames.shape[1:3]) >= 2 * GRID
    finest = grain(np.stack([to_lab(frame)[..., 0] for frame in chosen[:4]])) if pixels_differ else 0.0
    yield "texture", np.array([grain(cells[..., 0]), finest])


def describe(frames: np.ndarray) -> np.ndarray:
    """The look of one clip, uint8 [F, H, W, 3] -> float64 [D], in Lab units times `WEIGHTS`.

    Raises ValueError for anything but uint8 RGB frames of at least 8x8 pixels.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"a clip must be uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}")
    if min(frames.shape[1:3]) < 8:
        raise ValueError(f"a clip must be at least 8x8 pixels to have a look, got {list(frames.shape[1:3])}")
    return np.concatenate([WEIGHTS[name] / np.sqrt(len(values)) * values for name, values in look_groups(frames)])


def pairwise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows, [N, D] and [M, D] -> [N, M]."""
    return np.asarray(np.linalg.norm(x[:, None, :] - y[None, :, :], axis=-1))


def within(x: np.ndarray) -> float:
    """Mean distance between different rows of [N, D]: unbiased; 0.0 for a single row."""
    count = len(x)
    return float(pairwise(x, x).sum() / (count * (count - 1))) if count > 1 else 0.0


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Energy distance between two samples, [N, D] and [M, D]: 0 when they come from one distribution.

    sqrt(2 E|X-Y| - E|X-X'| - E|Y-Y'|) with unbiased terms (Szekely and Rizzo, 2013, Energy statistics), clipped at 0.
    Two single points at distance d are sqrt(2 d) apart.
    """
    if not len(x) or not len(y):
        raise ValueError(f"energy distance needs clips on both sides, got {len(x)} and {len(y)}")
    return float(np.sqrt(max(0.0, 2.0 * pairwise(x, y).mean() - within(x) - within(y))))


def look_distance(samples: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """Energy distance between the looks of two sets of clips, each uint8 [F, H, W, 3].

    Chance keeps sets of one look apart where they show different things: with 16 clips against 40, by up to half
    of what a strong look is away from none. So compare distances over the same prompts, and look at `nearness` too.
    """
    return energy_distance(np.stack([describe(c) for c in samples]), np.stack([describe(c) for c in reference]))


def nearness(clip: np.ndarray, reference: np.ndarray) -> float:
    """How far one clip [D] is from a brand's clips [M, D], in descriptor units; lower is nearer.

    E|x-Y| - E|Y-Y'| / 2, the energy score (Gneiting and Raftery, 2007): a proper score, so the brand with the lowest
    value is the best guess of whose clip it is, however varied each brand is.
    """
    return float(pairwise(clip[None], reference).mean() - 0.5 * within(reference))


def uniformity(samples: np.ndarray, reference: np.ndarray) -> Uniformity:
    """How evenly samples [N, D] carry the look of the reference [M, D]."""
    values = np.array([nearness(sample, reference) for sample in samples])
    worst = int(values.argmax())
    return Uniformity(
        mean=float(values.mean()), spread=float(values.std()), worst=float(values[worst]), worst_index=worst
    )
