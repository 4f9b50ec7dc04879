"""Wan's denoiser as its authors describe it, from weights under their names: what a converted one is held against.

A few lines of plain tensor arithmetic in fp32 that share nothing with diffusers or with the renaming. Sources: the
Wan report (arXiv 2503.20314), and the names and order of operations of `wan/modules/model.py` in Wan-Video/Wan2.2.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

Get = Callable[[str], Tensor]
"""A weight in fp32, by its original name."""
ROPE_BASE = 10000.0


def denoiser_states(
    get: Get, num_layers: int, num_heads: int, eps: float, latents: Tensor, t: Tensor, text: Tensor
) -> list[Tensor]:
    """Tokens after each block, [1, L, D], and at the end the output, [1, C, F, H, W].

    Args:
        latents: [1, C, F, H, W].
        t: [1], in [0, 1000].
        text: [1, N, text_dim], padded already.
    """
    kernel = get("patch_embedding.weight")
    patch = tuple(kernel.shape[2:])
    x = F.conv3d(latents, kernel, get("patch_embedding.bias"), stride=patch)
    grid = tuple(x.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    width = x.shape[-1]

    freq_dim = get("time_embedding.0.weight").shape[1]
    time = linear(get, "time_embedding.2", F.silu(linear(get, "time_embedding.0", sinusoid(t, freq_dim))))
    steps = linear(get, "time_projection.1", F.silu(time)).reshape(1, 6, width)
    context = linear(get, "text_embedding.2", gelu(linear(get, "text_embedding.0", text)))
    rotation = rope(grid, width // num_heads)

    states = []
    for number in range(num_layers):
        name = f"blocks.{number}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (steps + get(f"{name}.modulation")).unbind(1)
        y = plain_norm(x, eps) * (1 + scale1) + shift1
        x = x + gate1 * attention(get, f"{name}.self_attn", y, y, num_heads, eps, rotation)
        scale3 = get_or_none(get, f"{name}.norm3.weight")
        y = x if scale3 is None else plain_norm(x, eps) * scale3 + get(f"{name}.norm3.bias")
        x = x + attention(get, f"{name}.cross_attn", y, context, num_heads, eps, None)
        y = plain_norm(x, eps) * (1 + scale2) + shift2
        x = x + gate2 * linear(get, f"{name}.ffn.2", gelu(linear(get, f"{name}.ffn.0", y)))
        states.append(x)

    shift, scale = (get("head.modulation") + time[:, None]).unbind(1)
    x = linear(get, "head.head", plain_norm(x, eps) * (1 + scale) + shift)
    return [*states, unpatched(x, grid, patch)]


def get_or_none(get: Get, name: str) -> Tensor | None:
    """A weight that not every model has."""
    try:
        return get(name)
    except KeyError:
        return None


def linear(get: Get, name: str, x: Tensor) -> Tensor:
    """A layer by its name."""
    return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over all heads together."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def sinusoid(t: Tensor, size: int) -> Tensor:
    """[1, size]: cosines, then sines, of t at falling frequencies."""
    angles = t.double()[:, None] * ROPE_BASE ** -(torch.arange(size // 2).double() / (size // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rope(grid: tuple[int, ...], head_dim: int) -> Tensor:
    """Complex rotation of each token, [L, head_dim / 2]: time, height and width share the pairs of channels."""
    pairs = head_dim // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    parts = []
    for axis, (length, share) in enumerate(zip(grid, shares, strict=True)):
        angles = torch.outer(torch.arange(length).double(), ROPE_BASE ** -(torch.arange(share).double() / share))
        view = [1, 1, 1, share]
        view[axis] = length
        parts.append(angles.reshape(view).expand(*grid, share))
    angles = torch.cat(parts, dim=-1).reshape(prod(grid), pairs)
    return torch.polar(torch.ones_like(angles), angles)


def attention(
    get: Get, name: str, x: Tensor, context: Tensor, num_heads: int, eps: float, rotation: Tensor | None
) -> Tensor:
    """Attention of x on context, with normalised queries and keys, turned by position in self-attention."""
    query = rms_norm(linear(get, f"{name}.q", x), get(f"{name}.norm_q.weight"), eps)
    key = rms_norm(linear(get, f"{name}.k", context), get(f"{name}.norm_k.weight"), eps)
    value = linear(get, f"{name}.v", context)
    q, k, v = (part.reshape(1, part.shape[1], num_heads, -1).transpose(1, 2) for part in (query, key, value))
    if rotation is not None:
        q, k = (turned(part, rotation) for part in (q, k))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return linear(get, f"{name}.o", (weights @ v).transpose(1, 2).flatten(2))


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, multiplied by the rotation of their token."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).float()


def unpatched(x: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Tokens of patches back into a video, [1, C, F, H, W]."""
    frames, height, width = grid
    x = x.reshape(frames, height, width, *patch, -1)
    channels = x.shape[-1]
    x = x.permute(6, 0, 3, 1, 4, 2, 5)
    return x.reshape(1, channels, frames * patch[0], height * patch[1], width * patch[2])
