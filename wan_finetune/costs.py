"""What a LoRA step of a Wan denoiser costs: parameters, bytes of weights, floating-point operations. Plain arithmetic.

Shape suffixes: S tokens of a clip, B clips, d width, f feed-forward width, r LoRA rank. Operations are counted as
torch's flop counter does, two for a multiplication with its addition; tests hold the two against each other.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .spec import SPATIAL_MULTIPLE, TEMPORAL_STRIDE, TEXT_TOKENS, TransformerDims

Checkpointing = Literal["none", "selective", "full", "offloaded"]
Quantization = Literal["none", "fp8", "int8", "nf4"]

FP32_BYTES = 4

QUANTIZED_BYTES: Mapping[Quantization, float] = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight of a block's linears takes; nf4 keeps a scale of a byte for every 64
of them, and one of four for every 256 scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraShape:
    """What is injected into a denoiser, as far as costs go."""

    rank: int
    targets: tuple[str, ...]
    """Linears by the end of their names, as PEFT matches them."""
    dropout: float = 0.0
    modules: tuple[tuple[str, int], ...] = ()
    """Full names and ranks, such as ("blocks.3.attn1.to_q", 16), where blocks or linears differ; then rank and targets
    have no part."""

    def is_uniform(self, dims: TransformerDims) -> bool:
        """Whether all blocks carry the same."""
        return len({tuple(self.ranks(layer, dims).values()) for layer in range(dims.num_layers)}) == 1

    def ranks(self, layer: int, dims: TransformerDims) -> Mapping[str, int]:
        """The rank of every linear of a block, 0 where it carries no LoRA."""
        return _ranks(self, layer, dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Clips of one size that a process takes at once."""

    clips: int
    width: int
    height: int
    num_frames: int
    text_tokens: int = TEXT_TOKENS

    @property
    def clip_tokens(self) -> int:
        """S: tokens of one clip."""
        latent_frames = 1 + (self.num_frames - 1) // TEMPORAL_STRIDE
        return latent_frames * (self.height // SPATIAL_MULTIPLE) * (self.width // SPATIAL_MULTIPLE)

    @property
    def tokens(self) -> int:
        """B S: rows of every matrix product."""
        return self.clips * self.clip_tokens

    @property
    def text_rows(self) -> int:
        """Rows of the text's keys and values."""
        return self.clips * self.text_tokens


@functools.cache
def _ranks(lora: LoraShape, layer: int, dims: TransformerDims) -> Mapping[str, int]:
    if lora.modules:
        given = dict(lora.modules)
        return {name: given.get(f"blocks.{layer}.{name}", 0) for name in block_linears(dims)}
    ends = tuple(f".{target}" for target in lora.targets)
    return {name: lora.rank if f".blocks.{layer}.{name}".endswith(ends) else 0 for name in block_linears(dims)}


@functools.cache
def block_linears(dims: TransformerDims) -> Mapping[str, tuple[int, int]]:
    """The linears of a block, name -> (in, out), in the order in which they are called."""
    d, f = dims.width, dims.ffn_dim
    attention = {name: (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    return {
        **{f"attn1.{name}": shape for name, shape in attention.items()},
        **{f"attn2.{name}": shape for name, shape in attention.items()},
        "ffn.net.0.proj": (d, f),
        "ffn.net.2": (f, d),
    }


def block_matrix_parameters(dims: TransformerDims) -> int:
    """Weights of a block's linears without their biases: what quantization makes smaller."""
    return sum(wide * high for wide, high in block_linears(dims).values())


def block_vector_parameters(dims: TransformerDims) -> tuple[int, int]:
    """A block's other parameters, (in the base's dtype, kept in fp32): biases, norms of q and k; modulation, norm2."""
    biases = sum(out for _, out in block_linears(dims).values())
    return biases + 4 * dims.width, 6 * dims.width + (2 * dims.width if dims.cross_attn_norm else 0)


def outer_parameters(dims: TransformerDims) -> tuple[int, int]:
    """Parameters outside blocks, (in the base's dtype, kept in fp32): embeddings, head; time path, modulation."""
    d = dims.width
    time, height, width = dims.patch_size
    patch = time * height * width
    embedding = d * dims.in_channels * patch + d
    text = dims.text_dim * d + d + d * d + d
    projection = d * 6 * d + 6 * d
    head = d * dims.out_channels * patch + dims.out_channels * patch
    return embedding + text + projection + head, dims.freq_dim * d + d + d * d + d + 2 * d


def num_parameters(dims: TransformerDims) -> int:
    """Of a denoiser without LoRA."""
    block = block_matrix_parameters(dims) + sum(block_vector_parameters(dims))
    return dims.num_layers * block + sum(outer_parameters(dims))


def lora_parameters(dims: TransformerDims, lora: LoraShape, layer: int | None = None) -> int:
    """Trainable weights, of one block or of all."""
    shapes = block_linears(dims)
    layers = range(dims.num_layers) if layer is None else [layer]
    return sum(rank * sum(shapes[name]) for index in layers for name, rank in lora.ranks(index, dims).items())


def block_bytes(dims: TransformerDims, dtype_bytes: int, quantization: Quantization) -> float:
    """A block's frozen weights as they are stored."""
    matrix = QUANTIZED_BYTES.get(quantization, dtype_bytes)
    stored, fp32 = block_vector_parameters(dims)
    return block_matrix_parameters(dims) * matrix + stored * dtype_bytes + fp32 * 4


def base_bytes(dims: TransformerDims, dtype_bytes: int, quantization: Quantization) -> float:
    """A denoiser's frozen weights; diffusers keeps time path, norms and modulation in fp32 whatever the dtype."""
    stored, fp32 = outer_parameters(dims)
    return dims.num_layers * block_bytes(dims, dtype_bytes, quantization) + stored * dtype_bytes + fp32 * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Operations, apart because a GPU does not reach the same rate in both."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(linear=self.linear * factor, attention=self.attention * factor)

    @property
    def total(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """Which tensors of a block need a gradient: the base is frozen, so it depends on where LoRA sits before them."""

    inputs: bool
    """The block's input."""
    query: bool
    key: bool
    value: bool
    after_self: bool
    """The stream behind self-attention."""
    cross_query: bool
    cross_key: bool
    cross_value: bool
    after_cross: bool
    """The stream behind cross-attention."""
    inner: bool
    """The wide tensor of the feed-forward."""

    @property
    def self_attention(self) -> bool:
        return self.query or self.key or self.value

    @property
    def cross_attention(self) -> bool:
        return self.cross_query or self.cross_key or self.cross_value

    def into(self, name: str) -> bool:
        """Whether the input of this linear needs a gradient. The text's rows never do."""
        return {
            "attn1.to_out.0": self.self_attention,
            "attn2.to_q": self.after_self,
            "attn2.to_k": False,
            "attn2.to_v": False,
            "attn2.to_out.0": self.cross_attention,
            "ffn.net.0.proj": self.after_cross,
            "ffn.net.2": self.inner,
        }.get(name, self.inputs)


def gradients(ranks: Mapping[str, int], inputs: bool) -> Gradients:
    """Follow the need for gradients through a block with these ranks."""
    query, key, value = (inputs or ranks[f"attn1.{name}"] > 0 for name in ("to_q", "to_k", "to_v"))
    after_self = inputs or query or key or value or ranks["attn1.to_out.0"] > 0
    cross_query = after_self or ranks["attn2.to_q"] > 0
    cross_key, cross_value = ranks["attn2.to_k"] > 0, ranks["attn2.to_v"] > 0
    after_cross = after_self or cross_query or cross_key or cross_value or ranks["attn2.to_out.0"] > 0
    return Gradients(
        inputs=inputs,
        query=query,
        key=key,
        value=value,
        after_self=after_self,
        cross_query=cross_query,
        cross_key=cross_key,
        cross_value=cross_value,
        after_cross=after_cross,
        inner=after_cross or ranks["ffn.net.0.proj"] > 0,
    )


def linear_flops(rows: int, shape: tuple[int, int], rank: int, input_gradient: bool) -> tuple[float, float]:
    """(forward, backward) of a frozen linear with LoRA: the base needs no weight gradient, both LoRA matrices do."""
    wide, high = shape
    once, lora = 2.0 * rows, rank * (wide + high)
    backward = lora + (wide * high + rank * wide if input_gradient else 0) + rank * high
    return once * (wide * high + lora), once * backward if rank or input_gradient else 0.0


def attention_flops(batch: MicroBatch, dims: TransformerDims, keys: int) -> float:
    """Forward of one attention, 4 B S keys d. The backward pass of flash attention takes 2.5 times that."""
    return 4.0 * batch.tokens * keys * dims.width


def forward_flops(batch: MicroBatch, dims: TransformerDims, lora: LoraShape | None = None) -> Flops:
    """One evaluation of the denoiser."""
    plain = LoraShape(rank=0, targets=())
    blocks = [(lora or plain).ranks(layer, dims) for layer in range(dims.num_layers)]
    return sum((block_flops(batch, dims, ranks, inputs=False)[0] for ranks in blocks), outer_flops(batch, dims))


def outer_flops(batch: MicroBatch, dims: TransformerDims) -> Flops:
    """Forward of what lies outside the blocks."""
    d, (time, height, width) = dims.width, dims.patch_size
    patch = time * height * width
    tokens = batch.tokens * d * patch * (dims.in_channels + dims.out_channels)
    text = batch.text_rows * (dims.text_dim * d + d * d)
    time_path = batch.clips * (dims.freq_dim * d + d * d + 6 * d * d)
    return Flops(linear=2.0 * (tokens + text + time_path))


def block_flops(
    batch: MicroBatch, dims: TransformerDims, ranks: Mapping[str, int], inputs: bool
) -> tuple[Flops, Flops]:
    """(forward, backward) of one block; `inputs` says whether its input needs a gradient."""
    need = gradients(ranks, inputs)
    forward = backward = 0.0
    for name, shape in block_linears(dims).items():
        rows = batch.text_rows if name in ("attn2.to_k", "attn2.to_v") else batch.tokens
        ahead, back = linear_flops(rows, shape, ranks[name], need.into(name))
        forward, backward = forward + ahead, backward + back
    own, cross = (attention_flops(batch, dims, keys) for keys in (batch.clip_tokens, batch.text_tokens))
    attention_back = 2.5 * (own * need.self_attention + cross * need.cross_attention)
    return Flops(linear=forward, attention=own + cross), Flops(linear=backward, attention=attention_back)


@functools.cache
def step_flops(batch: MicroBatch, dims: TransformerDims, lora: LoraShape, checkpointing: Checkpointing) -> Flops:
    """Forward and backward of one micro-batch.

    Checkpointing evaluates every block once more; "selective" keeps the output of self-attention and evaluates the
    rest. The optimizer's operations, a few for each LoRA weight, are not counted.
    """
    d, (time, height, width) = dims.width, dims.patch_size
    total = outer_flops(batch, dims)
    # The gradient comes back through the head; the first block's input needs none.
    total += Flops(linear=2.0 * batch.tokens * d * dims.out_channels * time * height * width)
    inputs = False
    known: dict[tuple[object, ...], tuple[Flops, Flops]] = {}
    for layer in range(dims.num_layers):
        ranks = lora.ranks(layer, dims)
        # Blocks are alike but for the first one; dozens of them in dozens of plans would take a second.
        key = (*ranks.values(), inputs)
        if key not in known:
            known[key] = block_flops(batch, dims, ranks, inputs)
        forward, backward = known[key]
        total += forward + backward
        if checkpointing != "none":
            total += forward
        if checkpointing == "selective":
            total += Flops(attention=-attention_flops(batch, dims, batch.clip_tokens))
        inputs = inputs or any(ranks.values())
    return total
