"""Checkpoints in the layouts of Wan's authors and of ComfyUI, of a few thousand weights."""

import json

import torch
from safetensors.torch import save_file

from tests.original_wan import (
    TINY,
    TINY_HEADS,
    TINY_TEXT,
    autoencoder_shapes,
    denoiser_shapes,
    random_weights,
    text_encoder_shapes,
)
from wan_finetune.pocket.text import make_tokenizer

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def tiny_denoiser(seed):
    return random_weights(denoiser_shapes(**TINY), seed)


def wide(channels=16, dim=128, **more):
    """One block and one head of 128, as a single file shows it; more weights by name."""
    sizes = {"dim": dim, "ffn_dim": 8, "num_layers": 1, "text_dim": 32, "freq_dim": 16}
    return random_weights(denoiser_shapes(**sizes, channels=channels), 1) | more


def tiny_text_encoder():
    return random_weights(text_encoder_shapes(**TINY_TEXT), 3)


def tiny_autoencoder():
    return random_weights(autoencoder_shapes(4), 4)


def original_config(**changes):
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": TINY["dim"],
        "eps": 1e-06,
        "ffn_dim": TINY["ffn_dim"],
        "freq_dim": TINY["freq_dim"],
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": TINY_HEADS,
        "num_layers": TINY["num_layers"],
        "out_dim": 16,
        "text_len": 512,
        **changes,
    }


def write_denoiser(folder, weights, num_shards=2, **config):
    """Shards with an index and `config.json`, as the authors publish an expert."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    places = {}
    for number in range(num_shards):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(original_config(**config)))


def write_rest(folder):
    """Text encoder, autoencoder and tokenizer, as the authors publish them."""
    text_encoder = {name: value.bfloat16() for name, value in tiny_text_encoder().items()}
    torch.save(text_encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(tiny_autoencoder(), folder / "Wan2.1_VAE.pth")
    make_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")


def write_a14b(folder):
    """Wan2.2-T2V-A14B's layout; the weights of both experts."""
    experts = {"high_noise_model": tiny_denoiser(1), "low_noise_model": tiny_denoiser(2)}
    for name, weights in experts.items():
        write_denoiser(folder / name, weights)
    write_rest(folder)
    return experts


def write_wan21(folder):
    """Wan2.1's layout: one denoiser in one file."""
    weights = tiny_denoiser(5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config()))
    write_rest(folder)
    return weights
