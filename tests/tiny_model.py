"""Random Wan-shaped bases of a few thousand weights, with both experts or one: quick enough for every test."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from wan_finetune.pocket.text import make_text_encoder, make_tokenizer


def write_tiny_base(folder: Path, num_experts: int = 2) -> None:
    """Write a diffusers folder; the experts differ, and their output is not zero. With one it is Wan2.1-shaped."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer))
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        in_channels=12, out_channels=12, patch_size=2,
    )  # fmt: skip
    experts = [
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=64, freq_dim=16, ffn_dim=32, num_layers=2
        )
        for _ in range(num_experts)
    ]
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=experts[0],
        transformer_2=experts[1] if num_experts == 2 else None,
        boundary_ratio=0.875 if num_experts == 2 else None,
    )
    pipe.save_pretrained(folder)
