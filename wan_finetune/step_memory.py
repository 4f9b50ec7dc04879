"""How much GPU memory a LoRA step takes at its worst moment, and what the stages around it take. Plain arithmetic."""

import functools
import math
from dataclasses import dataclass

from .activations import BlockSizes, Precision, block_saved, lean_passing_tensors, passing_tensors
from .costs import (
    FP32_BYTES,
    Checkpointing,
    LoraShape,
    MicroBatch,
    Quantization,
    base_bytes,
    block_bytes,
    block_linears,
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
UNTILED_PIXELS = 2**20
"""Largest frame that the autoencoder takes in one piece, as in `wan_finetune/encoders.py`."""


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


def step_memory(
    batch: MicroBatch, dims: TransformerDims, lora: LoraShape, precision: Precision, policy: MemoryPolicy
) -> StepMemory:
    """The worst moment of a step after the first, over all blocks.

    The last block sees every checkpointed input, the first one the gradients of all others.
    """
    base, compute = weight_bytes(dims, lora, precision, policy)
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
            passing_of = lean_passing_tensors if checkpointed else passing_tensors
            known[key] = (
                block_saved(batch, dims, lora, ranks, precision, inputs, lean=checkpointed),
                passing_of(batch, dims, lora, ranks, precision),
            )
        saved, passing = known[key]
        waiting = sum(trainable) if accumulates else sum(trainable[layer + 1 :])
        kept = checkpoint_inputs(layer, dims, sizes, checkpointing)
        working = fixed + saved + passing + (0 if checkpointed else saved_before + sizes.stream)
        candidates.append((states + FP32_BYTES * waiting, kept, working))
        # Without autocast the first norm saves the block's input itself, where that needs a gradient.
        saved_before += saved + (sizes.stream if inputs and not precision.autocast else 0)
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


def weight_bytes(
    dims: TransformerDims, lora: LoraShape, precision: Precision, policy: MemoryPolicy
) -> tuple[float, float]:
    """(stored on this GPU, in the dtype of the computation beside them), frozen weights of all resident denoisers."""
    block = block_bytes(dims, precision.base_bytes, policy.quantization)
    whole = base_bytes(dims, precision.base_bytes, policy.quantization)
    streamed = min(policy.stream_blocks, dims.num_layers)
    base = (whole - streamed * block) / policy.shards
    base += (policy.resident_denoisers - 1) * (whole - streamed * block) / policy.shards
    compute = min(streamed, STREAM_BUFFERS) * block
    if policy.shards > 1:
        compute += STREAM_BUFFERS * block
    if policy.quantization == "nf4":
        # Unpacked for one product at a time, forward and backward.
        compute += max(wide * high for wide, high in block_linears(dims).values()) * precision.activation_bytes
    elif policy.quantization != "none" or precision.base_bytes != precision.activation_bytes:
        # Autograd saves the weights with which a product was computed whose input needs a gradient.
        last = dims.num_layers - 1
        if policy.checkpointing == "none":
            weights = sum(saved_weights(dims, lora, layer) for layer in range(dims.num_layers))
        else:
            # The block's last linear has let go of its own by the worst moment.
            wide, high = block_linears(dims)["ffn.net.2"]
            weights = saved_weights(dims, lora, last) - wide * high * gradients(lora.ranks(last, dims), last > 0).inner
        compute += weights * precision.activation_bytes
    return base, compute


def saved_weights(dims: TransformerDims, lora: LoraShape, layer: int) -> int:
    """Weights of a block's linears that its backward pass needs; the first block's input needs no gradient."""
    need = gradients(lora.ranks(layer, dims), inputs=layer > 0)
    return sum(wide * high for name, (wide, high) in block_linears(dims).items() if need.into(name))


def vae_encode_bytes(width: int, height: int, num_frames: int) -> float:
    """Peak of Wan's own autoencoder encoding one clip in fp32; `wan_finetune/encoders.py` has the figures' source."""
    pixels = width * height
    if pixels > UNTILED_PIXELS:
        pixels = max(64, math.isqrt(UNTILED_PIXELS) // 64 * 64) ** 2
    return 508_000_000 + pixels * (14_100 + 12.5 * num_frames)


def sampling_bytes(batch: MicroBatch, dims: TransformerDims, dtype_bytes: int) -> float:
    """Peak of one denoiser's forward pass without gradients: its weights, and the feed-forward or the gate of a block.

    Adapters are in; guidance evaluates twice, one after the other.
    """
    stream, wide = batch.tokens * dims.width, batch.tokens * dims.ffn_dim
    gate = 4 * stream * dtype_bytes + 3 * stream * FP32_BYTES
    inner = (3 * stream + 3 * wide) * dtype_bytes + (stream if dtype_bytes < FP32_BYTES else 0) * FP32_BYTES
    return base_bytes(dims, dtype_bytes, "none") + max(gate, inner)
