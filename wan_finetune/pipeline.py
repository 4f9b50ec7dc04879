"""A ready `WanPipeline`: the base with both experts' adapters in."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from safetensors import SafetensorError

from .errors import InputError
from .experts import EXPERTS, LOW, base_folder, boundary_ratio
from .formats import peft
from .formats.reading import FORMATS, read_all

if TYPE_CHECKING:
    from .adapters import Adapter

ADAPTER_NAME = "brand"
ROOM = 0.8
"""Share of the free memory that weights may take; the rest is for what they compute."""
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")


def load_pipeline(
    base: str,
    adapter: str | Path | None = None,
    *,
    strength: float | tuple[float, float] = 1.0,
    shift: float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> WanPipeline:
    """Open a base model and put the adapters of both experts in.

    Args:
        base: `pocket`, a diffusers folder, or a repository of the Hub.
        adapter: a file, an adapter folder, a run's folder, or a Hub repository with `high_noise.safetensors`,
            `low_noise.safetensors` or both; for a base with one denoiser, with `pytorch_lora_weights.safetensors`.
        strength: of the adapters; one number, or (high, low). A base with one denoiser takes the first.
        shift: flow shift of the UniPC sampler. Left out: the one the adapter was previewed with, else the base's own.
        dtype: of the denoisers and the text encoder; bf16 on a GPU and fp32 on a CPU when left out. The autoencoder
            is always fp32.
        device: `cuda`, `cpu`, ...; a GPU when there is one.

    Raises:
        InputError: for a base or adapter that is missing, damaged, or of the wrong expert.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = base_folder(base, COMPONENTS, revision)
    if boundary_ratio(folder) is not None:
        folder = base_folder(base, (*COMPONENTS, LOW.component), revision)
    adapters = read_adapters(adapter) if adapter is not None else []
    try:
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
        pipe = WanPipeline.from_pretrained(folder, vae=vae, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"base model {base!r} cannot be opened ({reason}); fetch or convert it again") from error
    recorded = next((a.about["sampling_shift"] for a in adapters if "sampling_shift" in a.about), None)
    if shift is None and recorded is not None:
        shift = float(recorded)
    set_shift(pipe, shift)
    add_adapters(pipe, adapters, strength)
    pipe.set_progress_bar_config(disable=True)
    return place(pipe, device)


def place(pipe: WanPipeline, device: torch.device) -> WanPipeline:
    """Put the pipeline on its device; on a GPU that cannot hold all of it, one part at a time, or one block."""
    if device.type == "cuda":
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts]
        room = ROOM * torch.cuda.mem_get_info(device)[0]
        if max(sizes) > room:
            go_block_by_block(pipe, device)
            return pipe
        if sum(sizes) > room:
            pipe.enable_model_cpu_offload(device=device)
            return pipe
    return pipe.to(device)


def go_block_by_block(pipe: WanPipeline, device: torch.device) -> None:
    """Keep the denoisers in host memory; a block comes to the device when it is needed. Slow, and fits any card."""
    pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, exclude_modules="vae")


def set_shift(pipe: WanPipeline, shift: float | None) -> None:
    """Make UniPC the sampler, with this flow shift or the one it has."""
    changes = {} if shift is None else {"flow_shift": shift}
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **changes)


def read_adapters(source: str | Path) -> "list[Adapter]":
    """The adapters of a file, an adapter folder, a run's folder or a Hub repository, in any format read here."""
    return read_all(adapter_source(source))


def adapter_source(source: str | Path) -> Path:
    """Where adapters lie on this machine: the path itself, or a Hub repository's files in the local cache.

    Raises:
        InputError: there is no such path, and no such repository that can be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(source).exists():
        return Path(source)
    names = [file_format.file_name(expert) for file_format in FORMATS.values() for expert in EXPERTS.values()]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*names, peft.WEIGHTS, f"*{peft.CONFIG}"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"adapter {str(source)!r} is neither a path here nor a repository that can be had "
            f"({type(error).__name__}); check the name and your login"
        ) from error
    if not any(folder.rglob("*.safetensors")):
        raise InputError(
            f"adapter {str(source)!r}: the repository has none of {', '.join(dict.fromkeys(names))}; fetch the "
            "file that it has, and name that"
        )
    return folder


def add_adapters(pipe: WanPipeline, adapters: "Sequence[Adapter]", strength: float | tuple[float, float] = 1.0) -> None:
    """Inject adapters into the experts they belong to, every key matched.

    Raises:
        InputError: when one is of an expert, a size or of modules that the base has not.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    high, low = strength if isinstance(strength, tuple) else (strength, strength)
    strengths = {"high": high, "low": low, "single": high}
    for adapter in adapters:
        title = EXPERTS[adapter.expert].title
        if (pipe.config.boundary_ratio is None) != (adapter.expert == "single"):
            has = "one denoiser" if pipe.config.boundary_ratio is None else "a high-noise and a low-noise expert"
            raise InputError(f"the adapter of {title} does not fit this base, which has {has}")
        model = getattr(pipe, EXPERTS[adapter.expert].component)
        try:
            model.add_adapter(LoraConfig(**adapter.peft_config()), ADAPTER_NAME)
        except ValueError as error:
            raise InputError(f"the adapter of {title} does not fit this base: {error}") from None
        expected = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
        shapes = {name: value.shape for name, value in expected.items()}
        if shapes != {name: value.shape for name, value in adapter.weights.items()}:
            raise InputError(
                f"the adapter of {title} does not fit this base: its modules or sizes differ "
                f"({len(adapter.weights)} weights against {len(shapes)})"
            )
        set_peft_model_state_dict(model, dict(adapter.weights), adapter_name=ADAPTER_NAME)
        model.set_adapters(ADAPTER_NAME, strengths[adapter.expert])
