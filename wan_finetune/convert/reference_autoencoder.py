"""Wan2.1's autoencoder from weights under its authors' names: what a converted one is held against.

Whole sequences in plain arithmetic, causal in time, without the chunks and caches of the original, which give the same.
Source: names and order of operations of `wan/modules/vae2_1.py` in Wan-Video/Wan2.2.
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_denoiser import Get

DOWNSAMPLES, DOWN_STEPS = 11, (2, 5, 8)
"""Layers of the encoder, and those of them that halve the size."""
UPSAMPLES, UP_STEPS = 15, (3, 7, 11)
"""Layers of the decoder, and those of them that double the size."""


class ReferenceAutoencoder:
    """Encode and decode one clip."""

    def __init__(self, get: Get, names: Container[str]) -> None:
        self.get = get
        self.names = names

    def decode(self, latents: Tensor) -> Tensor:
        """[1, z, F, H, W] to [1, 3, 4F-3, 8H, 8W], not clamped."""
        x = self.conv("decoder.conv1", self.conv("conv2", latents))
        x = self.middle("decoder", x)
        for number in range(UPSAMPLES):
            name = f"decoder.upsamples.{number}"
            x = self.upsample(name, x) if number in UP_STEPS else self.residual(name, x)
        return self.conv("decoder.head.2", F.silu(self.norm("decoder.head.0", x)))

    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, 4F-3, 8H, 8W] to mean and log variance, [1, 2z, F, H, W]."""
        x = self.conv("encoder.conv1", video)
        for number in range(DOWNSAMPLES):
            name = f"encoder.downsamples.{number}"
            x = self.downsample(name, x) if number in DOWN_STEPS else self.residual(name, x)
        x = self.middle("encoder", x)
        return self.conv("conv1", self.conv("encoder.head.2", F.silu(self.norm("encoder.head.0", x))))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution that sees no later frame; with a stride in time it begins at the first."""
        kernel = self.get(f"{name}.weight")
        time, height, width = kernel.shape[2:]
        before = time - 1 if stride == 1 else 0
        x = F.pad(x, (width // 2, width // 2, height // 2, height // 2, before, 0))
        return F.conv3d(x, kernel, self.get(f"{name}.bias"), stride=(stride, 1, 1))

    def conv2d(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """A convolution of each frame."""
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        out = F.conv2d(x[0].transpose(0, 1), weight, bias, stride=stride, padding=padding)
        return out.transpose(0, 1)[None]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Channels at one length, times gamma."""
        size = x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        return x / size * x.shape[1] ** 0.5 * self.get(f"{name}.gamma").reshape(1, -1, 1, 1, 1)

    def residual(self, name: str, x: Tensor) -> Tensor:
        """Two convolutions beside a shortcut."""
        beside = self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.names else x
        x = self.conv(f"{name}.residual.2", F.silu(self.norm(f"{name}.residual.0", x)))
        return beside + self.conv(f"{name}.residual.6", F.silu(self.norm(f"{name}.residual.3", x)))

    def middle(self, half: str, x: Tensor) -> Tensor:
        """Between the halves: attention within each frame, with one head."""
        x = self.residual(f"{half}.middle.0", x)
        name = f"{half}.middle.1"
        mixed = self.conv2d(f"{name}.to_qkv", self.norm(f"{name}.norm", x))[0].transpose(0, 1).flatten(2)
        q, k, v = mixed.chunk(3, 1)
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        seen = (weights @ v.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[3:])
        x = x + self.conv2d(f"{name}.proj", seen.transpose(0, 1)[None])
        return self.residual(f"{half}.middle.2", x)

    def upsample(self, name: str, x: Tensor) -> Tensor:
        """Twice the size, and where there is a convolution in time twice the frames after the first."""
        first, rest = x[:, :, :1], x[:, :, 1:]
        if f"{name}.time_conv.weight" in self.names and rest.shape[2]:
            # Twice the channels become twice the frames.
            halves = self.conv(f"{name}.time_conv", rest).unflatten(1, (2, -1))
            x = torch.cat([first, halves.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return self.conv2d(f"{name}.resample.1", x, padding=1)

    def downsample(self, name: str, x: Tensor) -> Tensor:
        """Half the size, and where there is a convolution in time half the frames after the first."""
        x = self.conv2d(f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{name}.time_conv.weight" in self.names and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.conv(f"{name}.time_conv", x, stride=2)], 2)
        return x
