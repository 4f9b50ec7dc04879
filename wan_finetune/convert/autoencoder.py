"""Wan2.1's autoencoder, which Wan2.2-T2V-A14B uses as well, under its original names."""

from ..errors import InputError
from .parts import Part, meta_shapes, require_exact
from .weights import Weights

LATENT_CHANNELS = 16


def is_autoencoder(names: set[str]) -> bool:
    """Whether names are those of a Wan autoencoder as published."""
    return {"encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"} <= names


def autoencoder_part(weights: Weights) -> Part:
    """The autoencoder as `AutoencoderKLWan`; its latent statistics are diffusers' defaults, the published constants.

    Raises:
        InputError: another autoencoder, or weights that are missing, unknown or of other shapes.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    source = weights.files[0]
    channels, *_ = (*(weights.shape("conv2.weight") if "conv2.weight" in weights.tensors else ()), 0)
    if channels != LATENT_CHANNELS:
        hint = "; it is TI2V-5B's, from Wan2.2_VAE.pth" if channels == 48 else ""
        raise InputError(f"{source}: has {channels} latent channels{hint}. T2V-A14B and Wan2.1 need Wan2.1_VAE.pth")
    renamed = convert_wan_vae_to_diffusers({name: name for name in weights.tensors})
    with init_empty_weights():
        model = AutoencoderKLWan(base_dim=weights.shape("encoder.conv1.weight")[0])
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    part = Part(
        folder="vae",
        class_name="AutoencoderKLWan",
        library="diffusers",
        weights_name="diffusion_pytorch_model",
        config=config,
        weights=weights,
        names={old: new for new, old in renamed.items()},
    )
    require_exact(part, meta_shapes(model))
    return part
