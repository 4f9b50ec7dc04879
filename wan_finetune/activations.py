"""How much memory a LoRA step takes at its worst moment, in plain arithmetic. tests/test_plan.py holds it to traces.

What autograd saves of a block is summed from diffusers' `WanTransformerBlock` and PEFT's LoRA layer, in the order in
which they run. Five moments compete for the peak; the tests say that nothing else does.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from .costs import (
    FP32_BYTES,
    Checkpointing,
    Gradients,
    LoraShape,
    MicroBatch,
    Quantization,
    base_bytes,
    block_bytes,
    block_linears,
    block_matrix_parameters,
    gradients,
    lora_parameters,
)
from .spec import LATENT_CHANNELS, TransformerDims

LATENT_COPIES = 4
"""fp32 tensors of the latent's size during the backward pass: latents, noise, prediction, error."""
STREAM_BUFFERS = 2
"""Blocks of a pinned ring that are on the GPU at once: one computes, the next arrives."""
OFFLOAD_BUFFERS = 2
"""Block inputs on the GPU at once where they are kept in host memory: one leaves or arrives, one is in use."""


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
class MemoryPolicy:
    """What is kept where."""

    quantization: Quantization = "none"
    checkpointing: Checkpointing = "full"
    stream_blocks: int = 0
    """Blocks whose weights wait in pinned host memory."""
    shards: int = 1
    """GPUs that hold the base together (FSDP, ZeRO-3)."""
    resident_denoisers: int = 1
    optimizer_bytes: int = 8
    """States of a trainable weight: 8 for AdamW in fp32, 2 for its 8-bit form."""
    accumulates: bool = False
    """Gradients of earlier micro-batches stay while the next one is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes on one GPU at the worst moment of a step."""

    base: float
    compute_weights: float
    """Weights in the dtype of the computation beside the stored ones: of quantized, streamed or sharded blocks."""
    lora: float
    """Trainable weights, their optimizer states and the gradients that are there."""
    inputs: float
    """Block inputs that checkpointing keeps, and attention outputs where they are kept."""
    working: float
    """What is saved for the backward pass of one block, or of all without checkpointing, and passing tensors."""

    @property
    def total(self) -> float:
        return self.base + self.compute_weights + self.lora + self.inputs + self.working


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


def step_memory(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, precision: Precision, policy: MemoryPolicy
) -> StepMemory:
    """The worst moment of a step after the first, over all blocks.

    The last block sees every checkpointed input, the first one the gradients of all others.
    """
    base, compute = weight_bytes(dims, precision, policy)
    lora_bytes, kept, working = worst_moment(
        batch, dims, lora, precision, policy.checkpointing, policy.optimizer_bytes, policy.accumulates
    )
    return StepMemory(base=base, compute_weights=compute, lora=lora_bytes, inputs=kept, working=working)


@functools.cache
def worst_moment(
    batch: MicroBatch,
    dims: TransformerDims,
    lora: LoraShape,
    precision: Precision,
    checkpointing: Checkpointing,
    optimizer_bytes: int,
    accumulates: bool,
) -> tuple[float, float, float]:
    """(of LoRA, of kept inputs, of the working set) in bytes: what of `step_memory` changes during a step."""
    checkpointed = checkpointing != "none"
    sizes = BlockSizes.of(batch, dims, precision)
    trainable = [lora_parameters(dims, lora, layer) for layer in range(dims.num_layers)]
    states = sum(trainable) * (FP32_BYTES + optimizer_bytes)
    fixed = outside_bytes(batch, dims, precision)
    # The optimizer's own moment: all gradients, no activations.
    candidates = [(float(states + FP32_BYTES * sum(trainable)), 0.0, float(fixed))]
    known: dict[tuple[object, ...], tuple[int, int]] = {}
    saved_before = 0.0
    inputs = False
    for layer in range(dims.num_layers):
        ranks = lora.ranks(layer, dims)
        key = (*ranks.values(), inputs)
        if key not in known:
            passing = passing_tensors(batch, dims, lora, ranks, precision, checkpointed)
            known[key] = block_saved(batch, dims, lora, ranks, precision, inputs), passing
        saved, passing = known[key]
        waiting = sum(trainable) if accumulates else sum(trainable[layer + 1 :])
        kept = checkpoint_inputs(layer, dims, sizes, checkpointing)
        working = fixed + saved + passing + (0 if checkpointed else saved_before + sizes.stream)
        candidates.append((states + FP32_BYTES * waiting, kept, working))
        # Without autocast the first norm saves the block's input itself.
        saved_before += saved + (0 if precision.autocast else sizes.stream)
        inputs = inputs or any(ranks.values())
    return max(candidates, key=sum)


def checkpoint_inputs(layer: int, dims: TransformerDims, sizes: BlockSizes, checkpointing: Checkpointing) -> float:
    """Bytes of block inputs, and of attention outputs, that are on the GPU while `layer` is in its backward pass."""
    if checkpointing == "none":
        return 0.0
    if checkpointing == "offloaded":
        return min(layer + 1, OFFLOAD_BUFFERS) * sizes.stream
    kept = (layer + 1) * sizes.stream
    return kept + layer * sizes.attention if checkpointing == "selective" else kept


def outside_bytes(batch: MicroBatch, dims: TransformerDims, precision: Precision) -> int:
    """Activations outside the blocks: latents, text, rotary tables."""
    latents = LATENT_COPIES * FP32_BYTES * batch.tokens * LATENT_CHANNELS * 4
    text = batch.text_rows * (dims.text_dim + dims.width) * precision.activation_bytes
    rotary = 2 * FP32_BYTES * batch.clip_tokens * dims.head_dim
    return latents + text + rotary


def weight_bytes(dims: TransformerDims, precision: Precision, policy: MemoryPolicy) -> tuple[float, float]:
    """(stored on this GPU, in the dtype of the computation beside them), frozen weights of all resident denoisers."""
    block = block_bytes(dims, precision.base_bytes, policy.quantization)
    whole = base_bytes(dims, precision.base_bytes, policy.quantization)
    streamed = min(policy.stream_blocks, dims.num_layers)
    base = (whole - streamed * block) / policy.shards
    base += (policy.resident_denoisers - 1) * (whole - streamed * block) / policy.shards
    compute = min(streamed, STREAM_BUFFERS) * block
    if policy.shards > 1:
        compute += STREAM_BUFFERS * block
    matrices = block_matrix_parameters(dims) * precision.activation_bytes
    if policy.quantization == "nf4":
        # Unpacked for one product at a time, forward and backward.
        compute += max(wide * high for wide, high in block_linears(dims).values()) * precision.activation_bytes
    elif policy.quantization != "none" or precision.base_bytes != precision.activation_bytes:
        # Autograd saves the weights in which the product was computed.
        compute += matrices * (dims.num_layers if policy.checkpointing == "none" else 1)
    return base, compute
