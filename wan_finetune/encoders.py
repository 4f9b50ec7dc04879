"""Video and text encoders of a base model, used exactly as `WanPipeline` uses them."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .captions import clean_caption
from .errors import InputError
from .spec import TEXT_TOKENS

UNTILED_PIXELS = 2**20
"""Largest frame that is encoded in one piece, 1024x1024: Wan's own VAE takes 13.4 GiB for 1280x720x81 (traced)."""


class VideoEncoder:
    """Frames -> the raw latent: the posterior's mean, in fp32, and with `with_std` its standard deviation.

    The VAE works through four frames at a time by itself, with the same result. Frames above `untiled_pixels` are cut
    into overlapping tiles, which does change it (`tile_side` and tests/test_encoders.py say by how much): whether they
    are follows from the frame's size alone, never from the machine, so that a bucket's latents are one value
    everywhere. Another `untiled_pixels` than the default belongs into the key of a cache.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, with_std: bool = False, untiled_pixels: int = UNTILED_PIXELS
    ) -> None:
        self.vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(device)
        self.vae.requires_grad_(False).eval()
        self.with_std, self.untiled_pixels = with_std, untiled_pixels

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> dict[str, Tensor]:
        """uint8 [F, H, W, 3], F = 4n + 1 -> "latent" and on request "std", fp32 [C, f, h, w] on the CPU, as encoded.

        Raises:
            InputError: the device's memory is too small.
        """
        num_frames, height, width, _ = frames.shape
        self.vae.use_tiling = False
        if side := tile_side(width, height, self.untiled_pixels):
            # diffusers cuts after it has folded patches of pixels into channels, where a VAE does that.
            cut = side // (self.vae.config.patch_size or 1)
            self.vae.enable_tiling(cut, cut, cut * 3 // 4, cut * 3 // 4)
        try:
            pixels = torch.from_numpy(frames).to(self.vae.device).permute(3, 0, 1, 2).float() / 127.5 - 1.0
            posterior = self.vae.encode(pixels[None]).latent_dist
        except torch.OutOfMemoryError as error:
            needed = encode_bytes(min(side * side, width * height) if side else width * height, num_frames)
            raise InputError(
                f"encoding {width}x{height}x{num_frames} does not fit into the memory of {self.vae.device}: Wan's VAE "
                f"needs about {needed / 2**30:.1f} GiB, and workspace; free memory there, or use smaller buckets"
            ) from error
        tensors = {"latent": posterior.mode()[0].cpu()}
        return {**tensors, "std": posterior.std[0].cpu()} if self.with_std else tensors


def tile_side(width: int, height: int, untiled_pixels: int = UNTILED_PIXELS) -> int | None:
    """Side in pixels of the square tiles, a quarter of which overlaps, for frames of a size; None where it needs none.

    With the pocket VAE on footage, tiles of 320 pixels overlapping by 64 moved latents by 0.012 of their standard
    deviation (rms; 0.34 at most), tiles of 128 by 0.05: they know only what lies inside them.
    """
    if width * height <= untiled_pixels:
        return None
    return max(64, math.isqrt(untiled_pixels) // 64 * 64)


def encode_bytes(pixels: int, num_frames: int) -> int:
    """Peak of Wan's own VAE encoding a clip of frames of so many pixels, in bytes: weights, clip and activations.

    Traced on fake tensors, fp32, from 9 frames on: activations no longer grow then, only the clip does. What a GPU's
    convolutions take as workspace is not in it.
    """
    weights, activations, frame = 508_000_000, 14_100, 12.5
    return weights + int(pixels * (activations + frame * num_frames))


class TextEncoder:
    """Caption -> the rows of its real tokens."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel

        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.model = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype).to(device)
        self.model.requires_grad_(False).eval()

    @torch.inference_mode()
    def __call__(self, caption: str) -> Tensor:
        """Rows [L, D] on the CPU, at most 512, without padding."""
        tokens = self.tokenizer(
            clean_caption(caption), truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        return self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].cpu()


def pad_text(rows: list[Tensor]) -> Tensor:
    """Rows [L_i, D] of each clip -> [B, 512, D], zero-padded."""
    padded = rows[0].new_zeros(len(rows), TEXT_TOKENS, rows[0].shape[1])
    for index, text in enumerate(rows):
        padded[index, : len(text)] = text
    return padded


def latent_statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, fp32 [C, 1, 1, 1], from the autoencoder's config."""
    config = AutoencoderKLWan.load_config(folder, subfolder="vae")
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std
