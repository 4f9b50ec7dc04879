"""UMT5's encoder from weights under the names of Wan's authors: what a converted one is held against.

Plain tensor arithmetic in fp32, without transformers. Sources: the T5 report (arXiv 1910.10683) and UniMax
(arXiv 2304.09151), names and order of operations of `wan/modules/t5.py` in Wan-Video/Wan2.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_denoiser import Get, gelu, rms_norm

EPS = 1e-6
MAX_DISTANCE = 128
"""From here on all distances share a bucket."""


def text_encoder_states(get: Get, num_layers: int, num_heads: int, embedded: Tensor) -> list[Tensor]:
    """Tokens after each block, [1, L, D], and at the end the normalised output; every block has its own bias.

    Args:
        embedded: rows of the table for the tokens, [1, L, D].
    """
    x = embedded
    states = []
    for number in range(num_layers):
        name = f"blocks.{number}"
        y = rms_norm(x, get(f"{name}.norm1.weight"), EPS)
        q, k, v = (
            F.linear(y, get(f"{name}.attn.{part}.weight")).unflatten(-1, (num_heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        bias = position_bias(get(f"{name}.pos_embedding.embedding.weight"), x.shape[1])
        # T5 leaves out the division by the root of the width.
        mixed = ((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, get(f"{name}.attn.o.weight"))
        y = rms_norm(x, get(f"{name}.norm2.weight"), EPS)
        gate = gelu(F.linear(y, get(f"{name}.ffn.gate.0.weight")))
        x = x + F.linear(gate * F.linear(y, get(f"{name}.ffn.fc1.weight")), get(f"{name}.ffn.fc2.weight"))
        states.append(x)
    return [*states, rms_norm(x, get("norm.weight"), EPS)]


def position_bias(table: Tensor, length: int) -> Tensor:
    """[1, heads, L, L], from a table [buckets, heads]: half of the buckets for keys behind the query, half before.

    Of each half, the first half are single distances, the rest grow with the logarithm.
    """
    half = table.shape[0] // 2
    exact = half // 2
    buckets = torch.empty(length, length, dtype=torch.long)
    for query in range(length):
        for key in range(length):
            distance = abs(key - query)
            if distance < exact:
                bucket = distance
            else:
                growth = math.log(distance / exact) / math.log(MAX_DISTANCE / exact)
                bucket = min(half - 1, exact + int(growth * (half - exact)))
            buckets[query, key] = bucket + (half if key > query else 0)
    return table[buckets].permute(2, 0, 1)[None]
