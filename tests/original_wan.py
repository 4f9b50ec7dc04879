"""Wan's models under the names that their authors gave: the shapes of all weights.

Names and shapes are typed after `wan/modules/{model,t5,vae2_1}.py` of Wan-Video/Wan2.2; nothing here comes from
diffusers, transformers or the conversion.
"""

import torch

A14B = {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096, "freq_dim": 256}
WAN21_SMALL = {"dim": 1536, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096, "freq_dim": 256}
TINY = {"dim": 24, "ffn_dim": 40, "num_layers": 2, "text_dim": 32, "freq_dim": 16}
TINY_HEADS = 2
UMT5_XXL = {"vocab": 256384, "dim": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24}
TINY_TEXT = {"vocab": 350, "dim": 32, "dim_ffn": 48, "num_heads": 4, "num_layers": 2}
CONV = (3, 3, 3)


def denoiser_shapes(dim, ffn_dim, num_layers, text_dim, freq_dim, channels=16):
    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    linear("text_embedding.0", dim, text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, freq_dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for number in range(num_layers):
        block = f"blocks.{number}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", dim, dim)
            shapes[f"{block}.{attention}.norm_q.weight"] = (dim,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (dim,)
        linear(f"{block}.ffn.0", ffn_dim, dim)
        linear(f"{block}.ffn.2", dim, ffn_dim)
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", 4 * 16, dim)
    return shapes


def text_encoder_shapes(vocab, dim, dim_ffn, num_heads, num_layers):
    shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for number in range(num_layers):
        block = f"blocks.{number}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (dim,)
        for part in "qkvo":
            shapes[f"{block}.attn.{part}.weight"] = (dim, dim)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, num_heads)
        shapes[f"{block}.ffn.gate.0.weight"] = shapes[f"{block}.ffn.fc1.weight"] = (dim_ffn, dim)
        shapes[f"{block}.ffn.fc2.weight"] = (dim, dim_ffn)
    return shapes


def autoencoder_shapes(dim, z_dim=16):
    shapes = {}

    def conv(name, outputs, inputs, kernel=CONV):
        shapes[f"{name}.weight"] = (outputs, inputs, *kernel)
        shapes[f"{name}.bias"] = (outputs,)

    def residual(name, inputs, outputs):
        shapes[f"{name}.residual.0.gamma"] = (inputs, 1, 1, 1)
        conv(f"{name}.residual.2", outputs, inputs)
        shapes[f"{name}.residual.3.gamma"] = (outputs, 1, 1, 1)
        conv(f"{name}.residual.6", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.shortcut", outputs, inputs, (1, 1, 1))

    def middle(half, width):
        residual(f"{half}.middle.0", width, width)
        shapes[f"{half}.middle.1.norm.gamma"] = (width, 1, 1)
        conv(f"{half}.middle.1.to_qkv", 3 * width, width, (1, 1))
        conv(f"{half}.middle.1.proj", width, width, (1, 1))
        residual(f"{half}.middle.2", width, width)

    d1, d2, d4 = dim, 2 * dim, 4 * dim
    conv("encoder.conv1", d1, 3)
    for number, (inputs, outputs) in {0: (d1, d1), 1: (d1, d1), 3: (d1, d2), 4: (d2, d2)}.items():
        residual(f"encoder.downsamples.{number}", inputs, outputs)
    for number, (inputs, outputs) in {6: (d2, d4), 7: (d4, d4), 9: (d4, d4), 10: (d4, d4)}.items():
        residual(f"encoder.downsamples.{number}", inputs, outputs)
    for number, width in {2: d1, 5: d2, 8: d4}.items():
        conv(f"encoder.downsamples.{number}.resample.1", width, width, (3, 3))
        if number != 2:
            conv(f"encoder.downsamples.{number}.time_conv", width, width, (3, 1, 1))
    middle("encoder", d4)
    shapes["encoder.head.0.gamma"] = (d4, 1, 1, 1)
    conv("encoder.head.2", 2 * z_dim, d4)
    conv("conv1", 2 * z_dim, 2 * z_dim, (1, 1, 1))
    conv("conv2", z_dim, z_dim, (1, 1, 1))
    conv("decoder.conv1", d4, z_dim)
    middle("decoder", d4)
    stages = {0: (d4, d4), 4: (d2, d4), 8: (d2, d2), 12: (d1, d1)}
    for start, (inputs, outputs) in stages.items():
        for number in range(3):
            residual(f"decoder.upsamples.{start + number}", inputs if number == 0 else outputs, outputs)
    for number, width in {3: d4, 7: d4, 11: d2}.items():
        conv(f"decoder.upsamples.{number}.resample.1", width // 2, width, (3, 3))
        if number != 11:
            conv(f"decoder.upsamples.{number}.time_conv", 2 * width, width, (3, 1, 1))
    shapes["decoder.head.0.gamma"] = (d1, 1, 1, 1)
    conv("decoder.head.2", 3, d1)
    return shapes


def random_weights(shapes, seed, dtype=torch.float32):
    """Weights of which none could stand in for another: norms are near one, the rest small, all different."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("gamma")
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 16
        weights[name] = (1 + 0.3 * value if is_scale else value / fan_in**0.5).to(dtype)
    return weights
