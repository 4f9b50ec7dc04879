"""What a block's forward and backward pass keep in memory, in plain arithmetic.

What autograd saves is summed from diffusers' `WanTransformerBlock` and PEFT's LoRA layer, in the order in which they
run. Five moments compete for the peak; tests/test_plan.py holds the result to traces of the real step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .costs import FP32_BYTES, Gradients, LoraShape, MicroBatch, block_linears, gradients
from .spec import TransformerDims


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """In what the step computes."""

    base_bytes: int = 2
    """Of a frozen weight that is not quantized: 2 for bf16, 4 for fp32."""
    autocast: bool = True
    """bf16 autocast. Without it everything is fp32."""
    casts_lora_input: bool = True
    """PEFT's default: the input of every LoRA is cast to fp32 first, and by autocast back again."""

    @property
    def activation_bytes(self) -> int:
        return 2 if self.autocast else 4

    @property
    def copies_lora_input(self) -> bool:
        return self.autocast and self.casts_lora_input


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSizes:
    """Bytes of the tensors that a block is made of."""

    stream: int
    """[B, S, d] in the dtype of activations."""
    stream_fp32: int
    """The fp32 copy that norms make; none where activations are fp32 already."""
    normed: int
    """[B, S, d] in fp32, saved by a norm."""
    wide: int
    """[B, S, f] in the dtype of activations."""
    wide_fp32: int
    attention: int
    """[B, S, d] and the logarithm of the softmax's denominator, saved by attention."""

    @classmethod
    def of(cls, batch: MicroBatch, dims: TransformerDims, precision: Precision) -> "BlockSizes":
        width, size = batch.tokens * dims.width, precision.activation_bytes
        return cls(
            stream=width * size,
            stream_fp32=width * FP32_BYTES if precision.autocast else 0,
            normed=width * FP32_BYTES,
            wide=batch.tokens * dims.ffn_dim * size,
            wide_fp32=batch.tokens * dims.ffn_dim * FP32_BYTES,
            attention=width * size + batch.tokens * dims.num_heads * FP32_BYTES,
        )


def lora_saved(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, ranks: Mapping[str, int], precision: Precision
) -> dict[str, int]:
    """Bytes that the LoRA of each linear saves: its own copy of the input, if any, its hidden rows, cast weights."""
    size, saved = precision.activation_bytes, {}
    own_copy = precision.copies_lora_input or lora.dropout > 0
    for name, (wide, high) in block_linears(dims).items():
        rows = batch.text_rows if name in ("attn2.to_k", "attn2.to_v") else batch.tokens
        rank, total = ranks[name], 0
        if rank:
            total = rows * rank * size + (rank * (wide + high) * size if precision.autocast else 0)
            total += rows * wide * size if own_copy else 0
            total += rows * wide if lora.dropout > 0 else 0
        saved[name] = total
    return saved


def block_saved(
    batch: MicroBatch,
    dims: TransformerDims,
    lora: LoraShape,
    ranks: Mapping[str, int],
    precision: Precision,
    inputs: bool,
) -> int:
    """Bytes that autograd saves of a block's forward pass, its input apart; `inputs`: that one needs a gradient."""
    sizes, need = BlockSizes.of(batch, dims, precision), gradients(ranks, inputs)
    shared = not (precision.copies_lora_input or lora.dropout > 0)
    text = batch.text_rows * dims.width
    norms = sizes.stream_fp32 * need.inputs + sizes.normed * (need.after_self + need.after_cross)
    heads = sizes.normed * (need.query + need.key + need.cross_query) + text * FP32_BYTES * need.cross_key
    attention = (3 * sizes.stream + sizes.attention) * need.self_attention
    attention += (sizes.stream + sizes.attention + 2 * text * precision.activation_bytes) * need.cross_attention
    hidden = sizes.wide * need.inner
    loras = sum(lora_saved(batch, dims, lora, ranks, precision).values())
    return norms + heads + attention + hidden + loras + (shared_inputs(sizes, ranks, need) if shared else 0)


def shared_inputs(sizes: BlockSizes, ranks: Mapping[str, int], need: Gradients) -> int:
    """Bytes of linears' inputs that are saved for their LoRA where it makes no copy of its own."""
    own = any(ranks[f"attn1.{name}"] for name in ("to_q", "to_k", "to_v"))
    streams = own + (ranks["attn2.to_q"] > 0) + (ranks["ffn.net.0.proj"] > 0)
    # Attention has saved its output already, unless nothing before it needs a gradient.
    streams += (ranks["attn1.to_out.0"] > 0) * (not need.self_attention)
    streams += (ranks["attn2.to_out.0"] > 0) * (not need.cross_attention)
    return streams * sizes.stream + (ranks["ffn.net.2"] > 0) * sizes.wide


def passing_tensors(
    batch: MicroBatch,
    dims: TransformerDims,
    lora: LoraShape,
    ranks: Mapping[str, int],
    precision: Precision,
    checkpointed: bool,
) -> int:
    """Most bytes beside what a block saves, its input apart: the largest of five moments."""
    sizes = BlockSizes.of(batch, dims, precision)
    down = lora_saved(batch, dims, lora, ranks, precision)["ffn.net.2"]
    copies, dropped = precision.copies_lora_input, lora.dropout > 0
    shared = not (copies or dropped)
    # Alive to the block's end: the stream, cross-attention's output, the feed-forward's input if no LoRA saves it.
    alive = 2 * sizes.stream + (0 if shared and ranks["ffn.net.0.proj"] else sizes.stream)
    has_up, has_down = ranks["ffn.net.0.proj"] > 0, ranks["ffn.net.2"] > 0
    activated = 0 if shared and has_down else sizes.wide
    # Where a block is evaluated again, the gradient of its output waits, in fp32; and the last product is not made.
    waiting = sizes.normed if checkpointed else 0
    gate = alive + sizes.stream + 2 * sizes.stream_fp32 + (0 if checkpointed else sizes.normed)
    if not precision.autocast and not checkpointed:
        gate += sizes.stream
    moments = [gate]
    if has_down:
        cast = (sizes.wide_fp32 if copies else 0) * (2 if copies and dropped else 1)
        moments.append(alive + activated + cast + 3 * sizes.stream)
    if has_up:
        cast = (sizes.normed if copies else 0) * (2 if copies and dropped else 1)
        before = sizes.wide + down + (sizes.wide if shared and has_down else 0)
        moments.append(alive + cast + 3 * sizes.wide - before)
    forward = max(moments) + waiting
    # Backward through the last linear: its input's gradient from the base and, if there is one, from LoRA; their sum.
    gradient = sizes.stream + 2 * sizes.wide
    if has_down:
        gradient += (sizes.wide_fp32 if copies else sizes.wide) - (sizes.wide if shared else down)
    return max(forward, gradient, text_keys_backward(batch, dims, lora, ranks, precision))


def text_keys_backward(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, ranks: Mapping[str, int], precision: Precision
) -> int:
    """Bytes at the backward pass of the norm of the text's keys, beside what a block saves: the worst moment of clips
    that have fewer tokens than their text. What lies behind cross-attention has been freed by then.
    """
    sizes, loras = BlockSizes.of(batch, dims, precision), lora_saved(batch, dims, lora, ranks, precision)
    if not ranks["attn2.to_k"]:
        return 0
    shared = not (precision.copies_lora_input or lora.dropout > 0)
    text, size = batch.text_rows * dims.width, precision.activation_bytes
    freed = sizes.normed + sizes.wide + sum(loras[n] for n in ("attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"))
    freed += sizes.stream + sizes.attention + 2 * text * size
    if shared:
        freed += (ranks["ffn.net.0.proj"] > 0) * sizes.stream + (ranks["ffn.net.2"] > 0) * sizes.wide
    # Gradients of the stream, the queries, the keys and the values wait; the norm's backward makes four fp32 tensors.
    return 2 * sizes.stream + 2 * text * size + 4 * text * FP32_BYTES - freed
