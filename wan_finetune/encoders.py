"""Video and text encoders of a base model, used exactly as `WanPipeline` uses them."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .captions import clean_caption
from .spec import TEXT_TOKENS


class VideoEncoder:
    """Frames -> the raw latent: the posterior's mean, in fp32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(device)
        self.vae.requires_grad_(False).eval()

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> Tensor:
        """uint8 [F, H, W, 3] -> fp32 [C, f, h, w] on the CPU, not yet normalised."""
        pixels = torch.from_numpy(frames).to(self.vae.device).permute(3, 0, 1, 2).float() / 127.5 - 1.0
        return self.vae.encode(pixels[None]).latent_dist.mode()[0].cpu()


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
