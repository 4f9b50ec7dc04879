"""The video autoencoder of pocket Wan: a small `AutoencoderKLWan`, trained on rendered clips under any look."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import Tensor

from . import world
from .fit import fit
from .looks import apply_look, random_look

CONFIG = {
    "z_dim": 16,
    "base_dim": 12,
    "dim_mult": [2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
}
OBJECT_WEIGHT = 5.0
"""What the object's pixels weigh above the background's, which is most of the picture and the easier part."""
OUTLINE_WEIGHT = 12.0
"""What pixels within two of the outline weigh above that."""
KL_WEIGHT = 3e-4


def make() -> AutoencoderKLWan:
    """A new autoencoder that starts as a plain chain of resamplings, with little noise in the latents.

    Residual branches and upsampling convolutions start at zero, so that the shortcuts alone carry the picture, and
    the time convolutions pass their newest frame through.
    """
    vae = AutoencoderKLWan(**CONFIG)
    torch.nn.init.zeros_(vae.quant_conv.weight[vae.z_dim :])
    torch.nn.init.constant_(vae.quant_conv.bias[vae.z_dim :], -5.0)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
        if isinstance(module, WanResample) and module.mode.endswith("3d"):
            weight, dim = module.time_conv.weight, module.dim
            torch.nn.init.zeros_(weight)
            torch.nn.init.zeros_(module.time_conv.bias)
            for copy in range(weight.shape[0] // dim):
                weight.data[copy * dim : (copy + 1) * dim, :, -1, 0, 0] = torch.eye(dim)
        if isinstance(module, WanResample) and module.mode.startswith("up"):
            torch.nn.init.zeros_(module.resample[1].weight)
            torch.nn.init.zeros_(module.resample[1].bias)
    return vae


def clip_tensor(frames: np.ndarray) -> Tensor:
    """uint8 [F, H, W, 3] -> float [3, F, H, W] in -1..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def training_batch(rng: np.random.Generator, clips: int, stills: bool) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, H, W] in -1..1, every other one in a random look, and their loss weights [B, 1, F, H, W]."""
    videos, weights = [], []
    for index in range(clips):
        scene = world.random_scene(rng, world.TRAINING[rng.integers(len(world.TRAINING))])
        frames = world.render(scene)
        mask = world.coverage(scene.shape, world.object_path(scene))
        if index % 2:
            frames = apply_look(frames, random_look(rng), rng)
        if stills:
            chosen = int(rng.integers(len(frames)))
            frames, mask = frames[chosen : chosen + 1], mask[chosen : chosen + 1]
        videos.append(clip_tensor(frames))
        weights.append(1.0 + object_weight(torch.from_numpy(mask).float())[None])
    return torch.stack(videos), torch.stack(weights)


def object_weight(mask: Tensor) -> Tensor:
    """What the object adds to each pixel's weight, [F, H, W], from its coverage, 0-1.

    Its outline counts most, for that is what tells a square from a circle.
    """
    grown = torch.nn.functional.max_pool2d(mask, 5, stride=1, padding=2)
    shrunk = -torch.nn.functional.max_pool2d(-mask, 5, stride=1, padding=2)
    return OBJECT_WEIGHT * grown + OUTLINE_WEIGHT * (grown - shrunk)


def reconstruction_loss(vae: AutoencoderKLWan, videos: Tensor, weights: Tensor, frozen_encoder: bool) -> Tensor:
    """Weighted L1 plus a little L2, and the KL term while the encoder still learns."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(not frozen_encoder):
            posterior = vae.encode(videos).latent_dist
        latent = posterior.mode() if frozen_encoder else posterior.sample()
        decoded = vae.decode(latent).sample
    error = (decoded.float() - videos).abs()
    value = (weights * (error + error.square())).mean() / weights.mean()
    if not frozen_encoder:
        value = value + KL_WEIGHT * posterior.kl().mean() / latent[0].numel()
    return value


def train(vae: AutoencoderKLWan, *, folder: Path, seed: int, still_steps: int, clip_steps: int) -> None:
    """Encoder and decoder together: stills first, then clips of full length."""

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        stills = step < still_steps
        videos, weights = training_batch(rng, 16 if stills else 4, stills)
        return reconstruction_loss(vae, videos, weights, frozen_encoder=False)

    fit(
        name="autoencoder",
        modules={"vae": vae},
        optimizers=[torch.optim.AdamW(vae.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)],
        loss=loss,
        steps=still_steps + clip_steps,
        seed=seed,
        folder=folder,
        ema_decay=0.995,
    )


def refine_decoder(vae: AutoencoderKLWan, *, folder: Path, seed: int, steps: int) -> None:
    """The decoder alone, on clips; the latents stay what they are, so a denoiser can be trained meanwhile."""
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        videos, weights = training_batch(rng, 4, stills=False)
        return reconstruction_loss(vae, videos, weights, frozen_encoder=True)

    fit(
        name="decoder",
        modules={"decoder": decoder},
        optimizers=[torch.optim.AdamW(decoder.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)],
        loss=loss,
        steps=steps,
        seed=seed,
        folder=folder,
        ema_decay=0.995,
    )
