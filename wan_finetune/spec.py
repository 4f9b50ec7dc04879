"""Numbers of Wan2.2-T2V-A14B that everything agrees on (sources: Wan-Video/Wan2.2, diffusers' Wan classes)."""

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
