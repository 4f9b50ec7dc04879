"""Judges of the pocket world: read colour, shape, background and motion back from the pixels of a clip.

The object is what differs from a smooth, static background, so shape and motion are read under any brand look that
leaves the two apart; colour and background are read against the world's own values.
"""

from dataclasses import dataclass

import numpy as np

from .world import ATTRIBUTES, BACKGROUNDS, CHINESE, COLOURS, ENGLISH, MARGIN, SHAPES, SIZE, coverage

MIN_TRAVEL = 7.0
"""Pixels the centre must cover in a clip to count as moving."""
MIN_GROWTH = 1.25
"""Final over initial radius that counts as growing."""
SOFTENED = (0.0, 1.5, 3.0)
"""Blur, in pixels, under which an outline still counts as the shape: samples are softer than renderings."""
MIN_CONTRAST = 8.0
"""Distance in RGB, 0-255, under which there is no object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was read from one clip; None where nothing fits."""

    colour: str | None
    shape: str | None
    background: str | None
    motion: str | None


def background_basis() -> np.ndarray:
    """Smooth functions of place that fit a vertical gradient under a vignette, [H, W, 8]."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    one = np.ones_like(x)
    return np.stack([one, y, y**2, y**3, x**2, x**2 * y, x**2 * y**2, y**4 + x**4], axis=-1)


def fit_background(frames: np.ndarray) -> np.ndarray:
    """The static, smooth background, float [H, W, 3]; the object's pixels are trimmed away in six rounds."""
    inside = slice(int(MARGIN), SIZE - int(MARGIN))
    basis = background_basis()
    features = np.broadcast_to(basis[None, inside, inside], (*frames[:, inside, inside].shape[:3], basis.shape[-1]))
    features = features.reshape(-1, basis.shape[-1])
    pixels = frames[:, inside, inside].reshape(-1, 3)
    rows = np.median(frames[:, inside, inside], axis=(0, 2))
    start = np.broadcast_to(rows[None, :, None], frames[:, inside, inside].shape).reshape(-1, 3)
    distance = np.linalg.norm(pixels - start, axis=1)
    for _ in range(6):
        kept = distance <= np.quantile(distance, 0.7)
        weights = np.linalg.lstsq(features[kept], pixels[kept], rcond=None)[0]
        distance = np.linalg.norm(pixels - features @ weights, axis=1)
    return basis @ weights


def object_mask(frames: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """Which pixels are the object, bool [F, H, W]; None where nothing stands out."""
    inside = slice(int(MARGIN), SIZE - int(MARGIN))
    distance = np.zeros(frames.shape[:3])
    distance[:, inside, inside] = np.linalg.norm(frames - background, axis=-1)[:, inside, inside]
    contrast = float(np.quantile(distance[:, inside, inside], 0.985))
    return distance > 0.5 * contrast if contrast > MIN_CONTRAST else None


def blur_matrix(sigma: float) -> np.ndarray:
    """Gaussian smoothing along one side of a frame, [SIZE, SIZE]; the identity for 0."""
    if sigma == 0:
        return np.eye(SIZE)
    place = np.arange(SIZE)
    weights = np.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
    return weights / weights.sum(1, keepdims=True)


def judge_shape(mask: np.ndarray, path: np.ndarray) -> str:
    """The shape whose outline covers the mask best, over all frames, drawn sharp or with softened corners.

    Every outline is drawn with the mask's own area around the mask's own centre.
    """
    centre, radius = SIZE / 2, SIZE / 4
    overlap: dict[str, float] = {}
    for shape in SHAPES:
        unit = coverage(shape, np.array([[centre, centre, radius]]))[0]
        offset_y = (unit.sum(1) @ (np.arange(SIZE) + 0.5)) / unit.sum() - centre
        scale = np.sqrt(path[:, 2] / unit.sum())
        placed = np.stack([path[:, 0], path[:, 1] - offset_y * scale, radius * scale], axis=1)
        drawn = coverage(shape, placed)
        for sigma in SOFTENED:
            smooth = blur_matrix(sigma)
            outline = smooth @ drawn @ smooth.T > 0.5
            share = (outline & mask).sum() / (outline | mask).sum()
            overlap[shape] = max(overlap.get(shape, 0.0), share)
    return max(overlap, key=lambda shape: overlap[shape])


def judge_motion(path: np.ndarray) -> str | None:
    """Direction of travel, or growth, from centres and areas [F, 3]."""
    time = np.linspace(-0.5, 0.5, len(path))
    slope = time @ (path - path.mean(0)) / (time @ time)
    if max(abs(slope[0]), abs(slope[1])) >= MIN_TRAVEL:
        if abs(slope[0]) > abs(slope[1]):
            return "right" if slope[0] > 0 else "left"
        return "down" if slope[1] > 0 else "up"
    ends = max(1, len(path) // 4)
    growth = np.sqrt(path[-ends:, 2].mean() / path[:ends, 2].mean())
    return "grow" if growth >= MIN_GROWTH else None


def judge(frames: np.ndarray) -> Verdict:
    """Read one clip, uint8 or float 0-255 [F, H, W, 3]."""
    frames = frames.astype(np.float64)
    background = fit_background(frames)
    ends = {name: np.asarray(colours, dtype=np.float64) for name, colours in BACKGROUNDS.items()}
    low, high = int(MARGIN), SIZE - 1 - int(MARGIN)
    found = np.stack([background[low].mean(0), background[high].mean(0)])
    fade = np.array([low, high])[:, None] / (SIZE - 1)
    nearest = min(ends, key=lambda n: np.linalg.norm(ends[n][0] + (ends[n][1] - ends[n][0]) * fade - found))
    mask = object_mask(frames, background)
    if mask is None or not mask.any(axis=(1, 2)).all():
        return Verdict(colour=None, shape=None, background=nearest, motion=None)
    area = mask.sum(axis=(1, 2))
    centre = np.arange(SIZE) + 0.5
    path = np.stack([mask.sum(1) @ centre / area, mask.sum(2) @ centre / area, area], axis=1)
    colour = np.median(frames[mask], axis=0)
    palette = {name: np.linalg.norm(np.asarray(value) - colour) for name, value in COLOURS.items()}
    return Verdict(
        colour=min(palette, key=lambda name: palette[name]),
        shape=judge_shape(mask, path),
        background=nearest,
        motion=judge_motion(path),
    )


def scene_in_words(prompt: str) -> dict[str, str]:
    """The attributes that a prompt in English or Chinese names; raises ValueError where one is missing."""
    found = {}
    for attribute, values in ATTRIBUTES.items():
        words = {value: (ENGLISH.get(value, value), CHINESE[value]) for value in values}
        named = [value for value, forms in words.items() if any(form in prompt for form in forms)]
        if len(named) != 1:
            raise ValueError(f"{prompt!r} names {len(named)} values of {attribute}, not one")
        found[attribute] = named[0]
    return found


def judge_prompt(frames: np.ndarray, prompt: str) -> dict[str, bool]:
    """Which attributes of the prompt the clip, uint8 [F, H, W, 3], shows."""
    verdict = judge(frames)
    return {attribute: getattr(verdict, attribute) == value for attribute, value in scene_in_words(prompt).items()}
