"""The two denoisers of pocket Wan: one model over all noise levels first, then a fork for each expert's interval."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5TokenizerFast, UMT5EncoderModel

from . import world
from .autoencoder import clip_tensor
from .fit import fit
from .looks import apply_look, random_look
from .text import TEXT_DIM, training_caption

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 576,
    "num_layers": 5,
}
TEXT_TOKENS = 512
TEXT_SLOTS = 40
"""Rows that a caption and its padding row are laid out in while training: one shape, so that one graph serves."""
FLOW_SHIFT = 3.0
BOUNDARY = 0.875


class FoldedPadding(WanAttnProcessor):
    """Cross-attention in which one zero row stands for all the padding.

    The pipeline pads the text to 512 zero rows and attends them unmasked; n equal keys are one key with log(n) added
    to its logit, so this is the same function at a tenth of the cost.
    """

    bias: Tensor | None = None
    """[B, 1, 1, L]: 0 for text, log(number of padding rows) for the padding row, -inf for unused slots."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert self.bias is not None, "set the bias of a batch before its forward pass"
        bias = self.bias.to(hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def make() -> WanTransformer3DModel:
    """A new denoiser that starts at zero output, with cross-attention sharp enough to see past 500 rows of padding."""
    model = WanTransformer3DModel(**CONFIG)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(block.ffn.net[2].weight)
        nn.init.constant_(block.attn2.norm_q.weight, 2.0)
        nn.init.constant_(block.attn2.norm_k.weight, 2.0)
        # A gate of one for both residual branches: the branches themselves start at zero.
        block.scale_shift_table.data[:, 2] = 1.0
        block.scale_shift_table.data[:, 5] = 1.0
    return model


def fold_padding(model: WanTransformer3DModel) -> FoldedPadding:
    """Give every cross-attention the same folding processor and return it."""
    processor = FoldedPadding()
    for block in model.blocks:
        block.attn2.set_processor(processor)
    return processor


def encode_folded(tokenizer: T5TokenizerFast, encoder: UMT5EncoderModel, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Text rows, one padding row and unused slots, [B, 40, D], and the attention bias [B, 1, 1, 40]."""
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=TEXT_SLOTS - 1, return_tensors="pt")
    rows = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]
    length = tokens.attention_mask.sum(1, keepdim=True)
    bias = torch.zeros(tokens.attention_mask.shape).masked_fill(tokens.attention_mask == 0, -math.inf)
    bias = torch.cat([bias, torch.log(TEXT_TOKENS - length.float())], dim=1)
    empty = TEXT_SLOTS - bias.shape[1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, empty + 1))
    return rows, torch.nn.functional.pad(bias, (0, empty), value=-math.inf)[:, None, None]


@torch.inference_mode()
def encode_scenes(vae: AutoencoderKLWan, seed: int, variants: range, graded: bool) -> tuple[Tensor, list[world.Scene]]:
    """Raw latents of clips of every training combination, [N, C, F, H, W], and their scenes; in random looks or plain.

    Looks are part of what a base model has seen: one that knew plain clips alone could hardly be taught a brand.
    """
    latents, scenes = [], []
    for variant in variants:
        rng = np.random.default_rng([seed, variant])
        batch = [world.random_scene(rng, combination) for combination in world.TRAINING]
        for first in range(0, len(batch), 16):
            clips = [world.render(scene) for scene in batch[first : first + 16]]
            if graded:
                clips = [apply_look(clip, random_look(rng), rng) for clip in clips]
            videos = torch.stack([clip_tensor(clip) for clip in clips])
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encode(videos).latent_dist.mode().float())
        scenes += batch
        print(f"[latents] variant {variant}", flush=True)
    return torch.cat(latents), scenes


def flow_loss(
    model: WanTransformer3DModel,
    processor: FoldedPadding,
    latents: Tensor,
    text: tuple[Tensor, Tensor],
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    """Squared error of the predicted velocity (noise - latents), a mean for each clip, [B]."""
    rows, processor.bias = text
    s = sigma.view(-1, 1, 1, 1, 1)
    # The CPU's fused attention takes four times as long as the plain one to go backward in bf16.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        predicted = model((1 - s) * latents + s * noise, sigma * 1000.0, rows, return_dict=False)[0]
    return (predicted.float() - (noise - latents)).square().mean((1, 2, 3, 4))


def stratified_sigma(batch: int, low: float, high: float) -> Tensor:
    """One noise level a clip, [B], inside [low, high], of the density of uniform time under the flow shift."""
    u_low, u_high = (s / (FLOW_SHIFT - (FLOW_SHIFT - 1) * s) for s in (low, high))
    u = u_low + (u_high - u_low) * (torch.randperm(batch) + torch.rand(batch)) / batch
    return FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)


def train(
    name: str,
    model: WanTransformer3DModel,
    tokenizer: T5TokenizerFast,
    encoder: UMT5EncoderModel,
    latents: Tensor,
    scenes: list[world.Scene],
    plain: int,
    *,
    interval: tuple[float, float],
    train_encoder: bool,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    folder: Path,
) -> None:
    """Train `model` on normalised `latents` at the noise levels of `interval`; the first `plain` are in no look."""
    processor = fold_padding(model)
    # Half the time a step: most of it is small operations between the matrix products.
    model.compile_repeated_blocks(dynamic=False)
    encoder.requires_grad_(train_encoder)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known] + [
        p for p in encoder.parameters() if p.requires_grad
    ]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def loss(step: int, rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(len(scenes), size=batch)
        text = encode_folded(tokenizer, encoder, [training_caption(scenes[i], i >= plain, rng) for i in chosen])
        clips = latents[torch.from_numpy(chosen)].float()
        return flow_loss(
            model, processor, clips, text, stratified_sigma(batch, *interval), torch.randn_like(clips)
        ).mean()

    fit(
        name=name,
        modules={"model": model, "text": encoder} if train_encoder else {"model": model},
        optimizers=optimizers,
        loss=loss,
        steps=steps,
        seed=seed,
        folder=folder,
        ema_decay=0.998,
    )
    for block in model.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    encoder.requires_grad_(False)
