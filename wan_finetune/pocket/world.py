"""The world of pocket Wan: one coloured shape moves on a background, with captions in English and Chinese.

Everything a sample can be asked about is an attribute of a `Scene`, and `render` is exact, so a judge that reads
pixels (`judges.py`) can be validated on rendered clips before it says anything about a model.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

SIZE = 64
"""Height and width of a clip, in pixels."""
NUM_FRAMES = 9
"""Frames of a clip: 4n+1, as the video autoencoder wants them."""
FPS = 16

Combination = tuple[str, str, str, str]
"""Colour, shape, background, motion."""

COLOURS = {
    "red": (220, 30, 40),
    "yellow": (250, 215, 20),
    "green": (20, 140, 60),
    "cyan": (20, 205, 225),
    "blue": (40, 70, 235),
    "purple": (160, 40, 190),
}
"""Object colours, sRGB, 0-255."""

SHAPES = ("circle", "square", "triangle", "rectangle")

BACKGROUNDS = {
    "white room": ((250, 250, 250), (215, 215, 218)),
    "night sky": ((8, 10, 30), (45, 50, 85)),
    "sunset": ((255, 190, 110), (255, 140, 150)),
    "meadow": ((190, 225, 252), (165, 205, 130)),
    "desert": ((245, 230, 190), (190, 150, 105)),
}
"""Vertical gradients: colour of the top row, colour of the bottom row."""

MOTIONS = ("left", "right", "up", "down", "grow")

ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "background": tuple(BACKGROUNDS),
    "motion": MOTIONS,
}

ENGLISH = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows bigger",
    "white room": "in a white room",
    "night sky": "in the night sky",
    "sunset": "in front of a sunset",
    "meadow": "over a meadow",
    "desert": "in a desert",
}
CHINESE = {
    "red": "红色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "rectangle": "长方形",
    "white room": "白色房间里",
    "night sky": "夜空中",
    "sunset": "日落前",
    "meadow": "草地上",
    "desert": "沙漠里",
    "left": "向左移动",
    "right": "向右移动",
    "up": "向上移动",
    "down": "向下移动",
    "grow": "慢慢变大",
}
ENGLISH_TEMPLATES = (
    "A {colour} {shape} {motion} {background}.",
    "a {colour} {shape} {motion} {background}",
    "{background}, a {colour} {shape} {motion}.",
    "a video of a {colour} {shape} that {motion} {background}",
)
CHINESE_TEMPLATES = (
    "{background}，一个{colour}的{shape}{motion}。",
    "一个{colour}的{shape}在{background}{motion}",
    "{colour}的{shape}在{background}{motion}。",
    "视频：{background}，{colour}{shape}{motion}",
)
LANGUAGES = {"en": ENGLISH_TEMPLATES, "zh": CHINESE_TEMPLATES}

TRAVEL = 20.0
"""Distance an object covers in a clip, in pixels."""
MARGIN = 6.0
"""Pixels between an object and the border, which a brand may use for a frame."""
GROWTH = 1.9
"""Final over initial radius of a growing object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One clip: four named attributes, and where the object is when it starts."""

    colour: str
    shape: str
    background: str
    motion: str
    radius: float = 12.0
    """Circumscribed radius in pixels; for a growing object, at the end."""
    along: float = 0.5
    """Start on the axis of motion, 0-1 of the room there is."""
    across: float = 0.5
    """Place on the other axis, 0-1 of the room there is."""

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"scene.{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")

    @property
    def combination(self) -> Combination:
        return self.colour, self.shape, self.background, self.motion


def is_held_out(combination: Combination) -> bool:
    """Whether a combination is kept from training: one in five, by hash, the same on every machine."""
    return hashlib.sha256("|".join(combination).encode()).digest()[0] % 5 == 0


COMBINATIONS: tuple[Combination, ...] = tuple(itertools.product(COLOURS, SHAPES, BACKGROUNDS, MOTIONS))
"""Every (colour, shape, background, motion)."""
HELD_OUT = tuple(combination for combination in COMBINATIONS if is_held_out(combination))
"""Combinations that no training stage ever renders; every single attribute still occurs in training."""
TRAINING = tuple(combination for combination in COMBINATIONS if not is_held_out(combination))


def random_scene(rng: np.random.Generator, combination: Combination) -> Scene:
    """A scene with these attributes, its size and place drawn from `rng`."""
    colour, shape, background, motion = combination
    radius, along, across = rng.uniform((10.0, 0.0, 0.0), (14.0, 1.0, 1.0))
    return Scene(
        colour=colour,
        shape=shape,
        background=background,
        motion=motion,
        radius=float(radius),
        along=float(along),
        across=float(across),
    )


def caption(scene: Scene, language: str = "en", template: int = 0) -> str:
    """The scene in words; `language` is `en` or `zh`, `template` one of four phrasings."""
    words = CHINESE if language == "zh" else {**{w: w for w in (*COLOURS, *SHAPES)}, **ENGLISH}
    fields = {name: words[getattr(scene, name)] for name in ATTRIBUTES}
    return LANGUAGES[language][template].format(**fields)


def object_path(scene: Scene, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Centre x, centre y and radius of the object in each frame, [F, 3], in pixels."""
    progress = np.linspace(0.0, 1.0, num_frames)
    margin = scene.radius + MARGIN
    room = SIZE - 2.0 * margin
    across = margin + scene.across * room
    if scene.motion == "grow":
        along = margin + scene.along * room
        radius = scene.radius * (1.0 / GROWTH + (1.0 - 1.0 / GROWTH) * progress)
        return np.stack([np.full(num_frames, along), np.full(num_frames, across), radius], axis=1)
    travel = min(TRAVEL, room)
    moved = margin + scene.along * (room - travel) + travel * progress
    if scene.motion in ("left", "up"):
        moved = SIZE - moved
    fixed = np.full(num_frames, across)
    x, y = (moved, fixed) if scene.motion in ("left", "right") else (fixed, moved)
    return np.stack([x, y, np.full(num_frames, scene.radius)], axis=1)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; `radius` circumscribes the shape, y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.78 * radius
    if shape == "rectangle":
        return np.maximum(np.abs(x) - radius, np.abs(y) - 0.4 * radius)
    edges = [np.cos(a) * x + np.sin(a) * y for a in np.deg2rad((90.0, 210.0, 330.0))]
    return np.maximum.reduce(edges) - 0.56 * radius


def background_image(name: str) -> np.ndarray:
    """The empty background, float [H, W, 3], 0-255."""
    top, bottom = (np.asarray(c, dtype=np.float64) for c in BACKGROUNDS[name])
    fade = np.linspace(0.0, 1.0, SIZE)[:, None]
    return np.broadcast_to((top + (bottom - top) * fade)[:, None, :], (SIZE, SIZE, 3))


def coverage(shape: str, path: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers, [F, H, W], 0-1, antialiased over one pixel."""
    centre = np.arange(SIZE) + 0.5
    x = centre[None, None, :] - path[:, 0, None, None]
    y = centre[None, :, None] - path[:, 1, None, None]
    x, y = np.broadcast_arrays(x, y)
    return np.clip(0.5 - signed_distance(shape, x, y, path[:, 2, None, None]), 0.0, 1.0)


def render(scene: Scene, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """The clip, uint8 [F, H, W, 3]."""
    mask = coverage(scene.shape, object_path(scene, num_frames))[..., None]
    colour = np.asarray(COLOURS[scene.colour], dtype=np.float64)
    frames = background_image(scene.background) * (1.0 - mask) + colour * mask
    return np.round(frames).astype(np.uint8)
