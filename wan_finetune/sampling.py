"""Sampling: the one function behind previews, evaluation and the command line, and the manifest beside each clip."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from .settings import Settings
from .spec import SPATIAL_MULTIPLE, TEMPORAL_STRIDE, TEXT_TOKENS

if TYPE_CHECKING:
    from diffusers import WanPipeline


class SamplingSettings(Settings):
    """How clips are sampled; the defaults are Wan2.2's own."""

    width: int = Field(832, ge=SPATIAL_MULTIPLE, multiple_of=SPATIAL_MULTIPLE)
    """Pixels, a multiple of 16."""
    height: int = Field(480, ge=SPATIAL_MULTIPLE, multiple_of=SPATIAL_MULTIPLE)
    """Pixels, a multiple of 16."""
    num_frames: int = Field(81, ge=1)
    """Frames, 4n+1."""
    fps: float = Field(16.0, gt=0)
    """Frames a second of the written file."""
    steps: int = Field(40, ge=1)
    """Sampler steps, both experts together."""
    guidance_scale: float = Field(4.0, ge=0)
    """Of the high-noise expert. At 1 or less guidance is off for both."""
    guidance_scale_2: float = Field(3.0, ge=0)
    """Of the low-noise expert."""
    shift: float = Field(12.0, gt=0)
    """Flow shift of the sampler."""
    negative_prompt: str = ""
    """What to steer away from. Wan's stock prompt names style and vivid colour, so none is the default here."""
    prompts: tuple[str, ...] = ()
    """Prompts of the previews during and after training."""
    seeds: tuple[int, ...] = (0,)
    """Seeds for each preview prompt."""
    batch_size: int = Field(1, ge=1)
    """Clips sampled at once."""

    @field_validator("num_frames")
    @classmethod
    def whole_latent_frames(cls, value: int) -> int:
        if value % TEMPORAL_STRIDE != 1:
            raise ValueError(f"num_frames must be 4n+1 (1, 5, 9, ... 81), got {value}")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One clip to make."""

    prompt: str
    seed: int


def sample(
    pipe: "WanPipeline",
    requests: Sequence[Request],
    settings: SamplingSettings,
    on_clips: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Clips for these requests, each uint8 [F, H, W, 3]; `on_clips` is told how many are done.

    The noise of a clip comes from its seed alone, drawn on the CPU.
    """
    import torch

    from .pipeline import set_shift

    set_shift(pipe, settings.shift)
    clips: list[np.ndarray] = []
    for first in range(0, len(requests), settings.batch_size):
        batch = requests[first : first + settings.batch_size]
        frames = pipe(
            prompt=[request.prompt for request in batch],
            negative_prompt=[settings.negative_prompt] * len(batch),
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            # A pipeline with one denoiser refuses a second scale.
            guidance_scale_2=None if pipe.config.boundary_ratio is None else settings.guidance_scale_2,
            generator=[torch.Generator().manual_seed(request.seed) for request in batch],
            max_sequence_length=TEXT_TOKENS,
            output_type="np",
        ).frames
        clips.extend(np.round(clip * 255.0).astype(np.uint8) for clip in frames)
        on_clips(len(clips))
    return clips


def write_clips(
    folder: Path,
    requests: Sequence[Request],
    clips: Sequence[np.ndarray],
    names: Sequence[str],
    settings: SamplingSettings,
    about: dict[str, str],
) -> list[Path]:
    """Write each clip as `NAME.mp4` and one `manifest.json` that says how each was made."""
    from .video import write_video

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.mp4" for name in names]
    for path, clip in zip(paths, clips, strict=True):
        write_video(path, clip, settings.fps)
    manifest = {
        "clips": [
            {"file": path.name, "prompt": request.prompt, "seed": request.seed}
            for path, request in zip(paths, requests, strict=True)
        ],
        "sampling": settings.model_dump(exclude={"prompts", "seeds"}),
        "about": about,
        "versions": versions(),
    }
    partial = folder / ".manifest.json.partial"
    partial.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(folder / "manifest.json")
    return paths


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a sample looks like."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
