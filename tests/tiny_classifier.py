"""An image classifier of a few thousand weights, of the class that the safety filter opens by default."""

import json
from pathlib import Path
from typing import Literal

import torch
from transformers import ViTConfig, ViTForImageClassification

PIXELS = 32


def write_tiny_classifier(
    folder: Path, flags: Literal["white", "nothing", "everything"], labels: tuple[str, str] = ("normal", "nsfw")
) -> Path:
    """Write a ViT that takes white frames for unsafe and black ones for safe, or all frames for one of both."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=PIXELS,
            patch_size=8, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
        )
    )  # fmt: skip
    head = model.classifier
    with torch.inference_mode():
        black, white = (
            model.vit(torch.full((1, 3, PIXELS, PIXELS), shade)).last_hidden_state[0, 0] for shade in (-1.0, 1.0)
        )
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([5.0, -5.0] if flags == "nothing" else [-5.0, 5.0]))
        if flags == "white":
            # +5 for white and -5 for black.
            towards = 10 * (white - black) / (white - black).square().sum()
            head.weight[1] = towards
            head.bias.copy_(torch.tensor([0.0, -float(towards @ (white + black)) / 2]))
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": PIXELS, "width": PIXELS},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
