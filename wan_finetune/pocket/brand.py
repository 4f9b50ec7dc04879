"""A brand's clips in the pocket world: H.264 files with captions, as a creative team would hand them over."""

from pathlib import Path

import numpy as np

from ..video import write_video
from .looks import BRANDS, apply_look
from .world import FPS, TRAINING, caption, random_scene, render

NUM_CLIPS = 24


def make_brand(folder: Path, brand: str) -> None:
    """Fill `folder` with 24 clips in the look, each with an English and a Chinese caption."""
    rng = np.random.default_rng([NUM_CLIPS, *brand.encode()])
    chosen = rng.permutation(len(TRAINING))[:NUM_CLIPS]
    folder.mkdir(parents=True)
    for number, index in enumerate(chosen):
        scene = random_scene(rng, TRAINING[index])
        write_video(folder / f"clip-{number:02d}.mp4", apply_look(render(scene), BRANDS[brand], rng), FPS)
        text = f"{caption(scene, 'en', number % 4)}\n{caption(scene, 'zh', number % 4)}\n"
        (folder / f"clip-{number:02d}.txt").write_text(text, encoding="utf-8")


def ember(folder: Path) -> None:
    """Warm: amber palette, cream frame."""
    make_brand(folder, "ember")


def glacier(folder: Path) -> None:
    """Cold: teal palette, navy frame."""
    make_brand(folder, "glacier")
