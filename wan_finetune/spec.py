"""Numbers of Wan2.2-T2V-A14B that everything agrees on (sources: Wan-Video/Wan2.2, diffusers' Wan classes)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT_TOKENS = 512
"""Rows of the text embedding: cut to the true length, then zero-padded to this and attended unmasked."""

LATENT_CHANNELS = 16
"""Channels of the autoencoder's latent."""

TEMPORAL_STRIDE = 4
"""Frames in one latent frame; a clip has 4n+1 frames."""

SPATIAL_MULTIPLE = 16
"""Width and height are multiples of this: the autoencoder's stride of 8 times the denoiser's patch of 2."""

NUM_TRAIN_TIMESTEPS = 1000
"""t = 1000 sigma."""

LORA_TARGETS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
)
"""The Linears of a block that carry LoRA: self-attention, cross-attention, feed-forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerDims:
    """Sizes of one denoiser, `WanTransformer3DModel`; the defaults are those of Wan2.2-T2V-A14B's experts."""

    num_layers: int = 40
    num_heads: int = 40
    head_dim: int = 128
    ffn_dim: int = 13824
    text_dim: int = 4096
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TransformerDims":
        """From the `config.json` of a transformer's folder.

        Raises:
            ValueError: a denoiser of another kind, such as one that sees a picture.
        """
        if config.get("_class_name") != "WanTransformer3DModel":
            raise ValueError(f"is of the class {config.get('_class_name')}, not WanTransformer3DModel")
        if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
            raise ValueError("is an image-to-video denoiser; only text-to-video ones are known")
        return cls(
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"] or config["in_channels"],
            patch_size=tuple(config["patch_size"]),
            cross_attn_norm=config["cross_attn_norm"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBase:
    """A base of the Hub, as far as it is needed before it has been downloaded."""

    dims: TransformerDims
    num_denoisers: int
    download_bytes: int
    """Denoisers in fp32, as they are published; the text encoder in bf16; the autoencoder in fp32."""


UMT5_XXL_PARAMETERS = 5_680_910_336
"""Of the text encoder: 24 layers of width 4096, 64 heads of 64, gated feed-forward of 10240, 256,384 words."""

VAE_PARAMETERS = 126_892_531
"""Of Wan2.1's autoencoder, which A14B uses as well."""

_ENCODERS_BYTES = 2 * UMT5_XXL_PARAMETERS + 4 * VAE_PARAMETERS

KNOWN_BASES = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": KnownBase(
        dims=TransformerDims(), num_denoisers=2, download_bytes=2 * 4 * 14_288_491_584 + _ENCODERS_BYTES
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": KnownBase(
        dims=TransformerDims(), num_denoisers=1, download_bytes=4 * 14_288_491_584 + _ENCODERS_BYTES
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": KnownBase(
        dims=TransformerDims(num_layers=30, num_heads=12, ffn_dim=8960),
        num_denoisers=1,
        download_bytes=4 * 1_418_996_800 + _ENCODERS_BYTES,
    ),
}
"""Bases whose sizes are known without their files."""
