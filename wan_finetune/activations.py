"""What a block's forward and backward pass keep in memory, in plain arithmetic.

What autograd saves is summed in the order in which a block runs: of diffusers' `WanTransformerBlock` and PEFT's LoRA
layer where nothing is checkpointed, of the lean block (`memory/lean.py`) where it is. Several moments compete for the
peak; tests/test_plan.py holds the result to traces of the real step.
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

    @property
    def activation_bytes(self) -> int:
        return 2 if self.autocast else 4


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
    """Bytes that the LoRA of each linear saves: hidden rows, cast weights; with dropout its input and the mask."""
    size, saved = precision.activation_bytes, {}
    for name, (wide, high) in block_linears(dims).items():
        rows = batch.text_rows if name in ("attn2.to_k", "attn2.to_v") else batch.tokens
        rank, total = ranks[name], 0
        if rank:
            total = rows * rank * size + (rank * (wide + high) * size if precision.autocast else 0)
            total += rows * wide * (size + 1) if lora.dropout > 0 else 0
        saved[name] = total
    return saved


def block_saved(
    batch: MicroBatch,
    dims: TransformerDims,
    lora: LoraShape,
    ranks: Mapping[str, int],
    precision: Precision,
    inputs: bool,
    lean: bool,
) -> int:
    """Bytes that autograd saves of a block's forward pass, its input apart; `inputs`: that one needs a gradient."""
    sizes, need = BlockSizes.of(batch, dims, precision), gradients(ranks, inputs)
    text = batch.text_rows * dims.width
    # A lean block keeps what a norm was given in the stream's precision, and makes linears' inputs out of it again.
    size, own = (precision.activation_bytes, sizes.stream) if lean else (FP32_BYTES, sizes.normed)
    heads = own * (need.query + need.key + need.cross_query) + text * size * need.cross_key
    if lean:
        norms = own * (need.after_self or ranks["attn2.to_q"] > 0)
        norms += own * (need.after_cross or ranks["ffn.net.0.proj"] > 0)
    else:
        norms = sizes.stream_fp32 * need.inputs + own * (need.after_self + need.after_cross)
    attention = (3 * sizes.stream + sizes.attention) * need.self_attention
    attention += (sizes.stream + sizes.attention + 2 * text * precision.activation_bytes) * need.cross_attention
    hidden = sizes.wide * need.inner
    loras = sum(lora_saved(batch, dims, lora, ranks, precision).values())
    shared = 0 if lora.dropout > 0 else shared_inputs(sizes, ranks, need, lean)
    return norms + heads + attention + hidden + loras + shared


def shared_inputs(sizes: BlockSizes, ranks: Mapping[str, int], need: Gradients, lean: bool) -> int:
    """Bytes of linears' inputs that are saved for their LoRA where it makes no copy of its own."""
    streams = 0
    if not lean:
        own = any(ranks[f"attn1.{name}"] for name in ("to_q", "to_k", "to_v"))
        streams = own + (ranks["attn2.to_q"] > 0) + (ranks["ffn.net.0.proj"] > 0)
    # Attention has saved its output already, unless nothing before it needs a gradient.
    streams += (ranks["attn1.to_out.0"] > 0) * (not need.self_attention)
    streams += (ranks["attn2.to_out.0"] > 0) * (not need.cross_attention)
    return streams * sizes.stream + (ranks["ffn.net.2"] > 0) * sizes.wide


def passing_tensors(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, ranks: Mapping[str, int], precision: Precision
) -> int:
    """Most bytes beside what a block saves that is not checkpointed, its input apart: the largest of four moments."""
    sizes = BlockSizes.of(batch, dims, precision)
    down = lora_saved(batch, dims, lora, ranks, precision)["ffn.net.2"]
    shared = lora.dropout == 0
    # Alive to the block's end: the stream, cross-attention's output, the feed-forward's input if no LoRA saves it.
    alive = 2 * sizes.stream + (0 if shared and ranks["ffn.net.0.proj"] else sizes.stream)
    has_up, has_down = ranks["ffn.net.0.proj"] > 0, ranks["ffn.net.2"] > 0
    activated = 0 if shared and has_down else sizes.wide
    gate = alive + sizes.stream + 2 * sizes.stream_fp32 + sizes.normed
    if not precision.autocast:
        gate += sizes.stream
    moments = [gate, feed_forward_backward(sizes, has_down, shared, down)]
    if has_down:
        moments.append(alive + activated + 3 * sizes.stream)
    if has_up:
        before = sizes.wide + down + (sizes.wide if shared and has_down else 0)
        moments.append(alive + 3 * sizes.wide - before)
    return max(moments)


def lean_passing_tensors(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, ranks: Mapping[str, int], precision: Precision
) -> int:
    """The same for a lean block that is evaluated again, while the gradient of its output waits: four moments."""
    sizes, loras = BlockSizes.of(batch, dims, precision), lora_saved(batch, dims, lora, ranks, precision)
    shared, has_down = lora.dropout == 0, ranks["ffn.net.2"] > 0
    # Of the last gate: the gradient, the feed-forward's output, their fp32 sum, and the block's output.
    gate = 2 * sizes.stream + sizes.normed + (sizes.stream if precision.autocast else 0)
    after = feed_forward_backward(sizes, has_down, shared, loras["ffn.net.2"])
    return max(gate, after, *norms_backward(batch, dims, lora, ranks, precision))


def feed_forward_backward(sizes: BlockSizes, has_down: bool, shared: bool, down: int) -> int:
    """Bytes at the backward pass through the last linear: its input's gradient from the base, from LoRA, their sum."""
    gradient = sizes.stream + 2 * sizes.wide
    return gradient + (sizes.wide - (sizes.wide if shared else down) if has_down else 0)


def norms_backward(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, ranks: Mapping[str, int], precision: Precision
) -> tuple[int, int]:
    """Bytes at the backward pass of cross-attention's norms, of its queries and of its keys, beside what a block saves.

    What lies behind cross-attention has been freed by then. The keys' is the worst moment of clips that have fewer
    tokens than their text.
    """
    sizes, loras = BlockSizes.of(batch, dims, precision), lora_saved(batch, dims, lora, ranks, precision)
    text, size = batch.text_rows * dims.width, precision.activation_bytes
    freed = sizes.stream + sizes.wide + sum(loras[n] for n in ("attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"))
    freed += sizes.stream + sizes.attention + 2 * text * size
    if lora.dropout == 0:
        freed += (ranks["ffn.net.2"] > 0) * sizes.wide
    # The gradients of the stream and the queries wait; a norm's backward makes six fp32 tensors, and its value again.
    queries = 3 * sizes.stream + (6 if precision.autocast else 5) * sizes.normed - freed
    # So does that of the text's values; that of its keys has taken the place of what their norm kept.
    queries += text * size * (ranks["attn2.to_v"] > 0)
    if not ranks["attn2.to_k"]:
        return queries, 0
    keys = 2 * sizes.stream + 3 * text * size + (6 if precision.autocast else 5) * text * FP32_BYTES - freed
    return queries, keys
