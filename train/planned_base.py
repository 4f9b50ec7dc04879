"""What is known of a base model before it is loaded: from its files where they are local, else from its name."""

import json
from dataclasses import dataclass
from pathlib import Path

from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder
from wan_finetune.spec import KNOWN_BASES, UMT5_XXL_PARAMETERS, TransformerDims

WAN_VAE_WIDTH = 96
"""base_dim of Wan2.1's autoencoder, whose memory is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """A base model in numbers."""

    title: str
    dims: TransformerDims
    num_denoisers: int
    text_encoder_parameters: int
    disk_bytes: int
    is_local: bool
    has_wan_vae: bool


def base_facts(base: str, public_name: str) -> BaseFacts:
    """Facts of a folder, of the embedded model, or of a repository that is known or has been downloaded.

    Raises:
        InputError: none of these, or a denoiser of another kind.
    """
    if base == "pocket" or Path(base).is_dir():
        return folder_facts(base_folder(base), public_name)
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        # Says what a base can be; a name of the Hub would be fetched by it.
        base_folder(base)
    if folder := downloaded(base):
        return folder_facts(folder, public_name)
    known = KNOWN_BASES.get(base)
    if known is None:
        raise InputError(
            f"model.base: the sizes of {base!r} are not known before it has been downloaded; known are "
            f"{', '.join(KNOWN_BASES)}. Download it, or give a local diffusers folder"
        )
    return BaseFacts(
        title=public_name,
        dims=known.dims,
        num_denoisers=known.num_denoisers,
        text_encoder_parameters=UMT5_XXL_PARAMETERS,
        disk_bytes=known.download_bytes,
        is_local=False,
        has_wan_vae=True,
    )


def downloaded(repository: str) -> Path | None:
    """The folder of a repository in the Hub's local cache, if its denoiser is there: the snapshot used last."""
    # Its layout is documented and stable; `try_to_load_from_cache` brings an HTTP client, a fifth of this command.
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    found = [path for path in snapshots.glob("*") if (path / "transformer" / "config.json").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def folder_facts(folder: Path, title: str) -> BaseFacts:
    """Facts of a diffusers folder."""
    config = folder / "transformer" / "config.json"
    try:
        dims = TransformerDims.from_config(json.loads(config.read_text(encoding="utf-8")))
    except OSError:
        raise InputError(f"model.base: {folder} has no transformer/config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        fault = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"model.base: {config} {fault}") from None
    vae = folder / "vae" / "config.json"
    vae_config = json.loads(vae.read_text(encoding="utf-8")) if vae.is_file() else {}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return BaseFacts(
        title=title,
        dims=dims,
        num_denoisers=2 if (folder / "transformer_2").is_dir() else 1,
        text_encoder_parameters=safetensors_parameters(folder / "text_encoder"),
        disk_bytes=sum(path.stat().st_size for path in files),
        is_local=True,
        has_wan_vae=vae_config.get("base_dim") == WAN_VAE_WIDTH and not vae_config.get("is_residual"),
    )


def safetensors_parameters(folder: Path) -> int:
    """Parameters in a folder's safetensors files, from their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            size = 1
            for side in entry["shape"] if name != "__metadata__" else [0]:
                size *= side
            total += size
    return total
