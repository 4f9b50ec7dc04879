"""The pocket model's figures: judges, autoencoder, prompts that were held out, and what the experts specialise in."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor

from ..addressing import numpy_rng, torch_rng
from ..density import Uniform, sample_sigma
from ..experts import HIGH, LOW
from ..flow import add_noise, timestep, velocity
from ..sampling import Request, SamplingSettings, sample
from . import world
from .autoencoder import clip_tensor
from .judges import judge

SAMPLING = SamplingSettings(
    width=world.SIZE,
    height=world.SIZE,
    num_frames=world.NUM_FRAMES,
    fps=world.FPS,
    steps=20,
    guidance_scale=3.0,
    guidance_scale_2=3.0,
    shift=3.0,
    batch_size=16,
)


def share_right(clips: list[np.ndarray], scenes: list[world.Scene]) -> dict[str, float]:
    """Share of clips, uint8 [F, H, W, 3], in which the judge reads each attribute as the scene has it."""
    verdicts = [judge(clip) for clip in clips]
    return {
        name: float(np.mean([getattr(v, name) == getattr(s, name) for v, s in zip(verdicts, scenes, strict=True)]))
        for name in world.ATTRIBUTES
    }


def held_out_scenes(count: int, *address: int | str) -> list[world.Scene]:
    """Scenes whose combinations no training stage has rendered, each combination in turn."""
    rng = numpy_rng("held out", *address)
    return [world.random_scene(rng, world.HELD_OUT[i % len(world.HELD_OUT)]) for i in range(count)]


def measure_judges(count: int = 300) -> dict[str, float]:
    """The judges on exact renderings: what they are worth."""
    rng = numpy_rng("judges")
    scenes = [world.random_scene(rng, world.COMBINATIONS[rng.integers(len(world.COMBINATIONS))]) for _ in range(count)]
    return share_right([world.render(scene) for scene in scenes], scenes)


@torch.inference_mode()
def measure_autoencoder(vae: AutoencoderKLWan, count: int = 118) -> dict[str, float]:
    """Mean PSNR in dB of reconstructed held-out clips, and the share of each attribute that survives."""
    scenes = held_out_scenes(count, "autoencoder")
    psnr, clips = [], []
    for scene in scenes:
        frames = world.render(scene)
        decoded = vae.decode(vae.encode(clip_tensor(frames)[None]).latent_dist.mode()).sample[0]
        clip = ((decoded + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
        error = np.square(clip.astype(np.float64) - frames).mean()
        psnr.append(10.0 * np.log10(255.0**2 / error))
        clips.append(clip)
    return {"psnr": float(np.mean(psnr)), **share_right(clips, scenes)}


def measure_prompts(pipe: WanPipeline, language: str, count: int = 118) -> dict[str, float]:
    """Share of samples that show each attribute of a held-out prompt, through the stock pipeline."""
    scenes = held_out_scenes(count, "prompts")
    requests = [Request(prompt=world.caption(scene, language, i % 4), seed=i) for i, scene in enumerate(scenes)]
    return share_right(sample(pipe, requests, SAMPLING), scenes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Specialisation:
    """Loss of both experts inside one expert's interval, on the same clips and noise."""

    own: float
    other: float
    standard_error: float
    """Of the mean difference, other minus own."""


@torch.inference_mode()
def measure_experts(pipe: WanPipeline, count: int = 256) -> dict[str, Specialisation]:
    """Whether each expert is the better one where the pipeline calls it."""
    scenes = held_out_scenes(count, "experts")
    mean, std = (torch.tensor(pipe.vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    found: dict[str, Specialisation] = {}
    for expert in (HIGH, LOW):
        interval = expert.interval(pipe.config.boundary_ratio)
        losses: dict[str, list[Tensor]] = {other.component: [] for other in (HIGH, LOW)}
        for first in range(0, count, 16):
            batch = scenes[first : first + 16]
            videos = torch.stack([clip_tensor(world.render(scene)) for scene in batch])
            latents = (pipe.vae.encode(videos).latent_dist.mode() - mean) / std
            text, _ = pipe.encode_prompt(
                [world.caption(s, "en") for s in batch], do_classifier_free_guidance=False, max_sequence_length=512
            )
            generator = torch_rng("experts", expert.name, first)
            sigma = sample_sigma(torch.rand(len(batch), generator=generator), interval, SAMPLING.shift, Uniform())
            noise = torch.randn(latents.shape, generator=generator)
            for component, values in losses.items():
                model: WanTransformer3DModel = getattr(pipe, component)
                predicted = model(add_noise(latents, noise, sigma), timestep(sigma), text, return_dict=False)[0]
                values.append((predicted - velocity(latents, noise)).square().mean((1, 2, 3, 4)))
        own = torch.cat(losses.pop(expert.component))
        other = torch.cat(losses.popitem()[1])
        difference = other - own
        found[expert.name] = Specialisation(
            own=float(own.mean()),
            other=float(other.mean()),
            standard_error=float(difference.std() / len(difference) ** 0.5),
        )
    return found


def open_stock_pipeline(folder: Path) -> WanPipeline:
    """The model as anybody would open it."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
