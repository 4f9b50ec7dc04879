"""Writing a trained adapter folder, and proving that it loads elsewhere before saying so."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from .adapters import Adapter
from .encoders import latent_statistics
from .experts import EXPERTS, base_folder, boundary_ratio, load_expert
from .formats import comfyui
from .formats import diffusers as diffusers_format


def write_adapter_folder(folder: Path, adapters: Sequence[Adapter], *, with_comfyui: bool = True) -> list[Path]:
    """Write `high_noise.safetensors` and `low_noise.safetensors`, and the same under `comfyui/`."""
    written = []
    for adapter in adapters:
        adapter.check(f"the adapter of {EXPERTS[adapter.expert].title}")
        name = EXPERTS[adapter.expert].file_name
        diffusers_format.write(folder / name, adapter)
        written.append(folder / name)
        if with_comfyui:
            comfyui.write(folder / "comfyui" / name, adapter)
            written.append(folder / "comfyui" / name)
    return written


def verify_adapter_folder(base: str, folder: Path, adapters: Sequence[Adapter], revision: str | None = None) -> None:
    """Load each file into a fresh expert through diffusers' own loader, and compare with the trained adapter.

    Each weight and alpha must come back, every target of the model must have been reached, and the output must have
    changed. The ComfyUI file must give the same output as the diffusers one.

    Raises:
        RuntimeError: when a file is not what was trained; the message names it.
    """
    base_path = base_folder(base, [EXPERTS[a.expert].component for a in adapters], revision)
    for adapter in adapters:
        expert = EXPERTS[adapter.expert]
        read_back = diffusers_format.read(folder / expert.file_name, adapter.expert)
        same = read_back.weights.keys() == adapter.weights.keys() and all(
            torch.equal(read_back.weights[name], value) for name, value in adapter.weights.items()
        )
        if not same or (read_back.alpha, read_back.rank) != (adapter.alpha, adapter.rank):
            raise RuntimeError(f"{folder / expert.file_name}: what was read back is not what was trained")
        outputs = {}
        files = {"diffusers": folder / expert.file_name, "comfyui": folder / "comfyui" / expert.file_name}
        for kind, file in files.items():
            if not file.is_file():
                continue
            model = load_expert(base_path, expert, torch.float32)
            reference = probe_output(model, base_path, adapter)
            load_with_diffusers(model, file)
            require_every_target(model, adapter, file)
            outputs[kind] = probe_output(model, base_path, adapter)
            if torch.equal(outputs[kind], reference):
                raise RuntimeError(f"{file}: loads, but changes nothing")
        if "comfyui" in outputs and not torch.allclose(outputs["comfyui"], outputs["diffusers"], rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{folder / 'comfyui' / expert.file_name}: gives another output than the diffusers file")


def load_with_diffusers(model: WanTransformer3DModel, file: Path) -> None:
    """`WanPipeline.load_lora_weights`, on a pipeline that holds just this expert."""
    state, metadata = WanPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    WanPipeline.load_lora_into_transformer(state, transformer=model, adapter_name="check", metadata=metadata)


def require_every_target(model: WanTransformer3DModel, adapter: Adapter, file: Path) -> None:
    """Every module that was trained carries a LoRA now, none is missing, none is zero."""
    found = {
        name.rsplit(".lora_B.check", 1)[0]
        for name, p in model.named_parameters()
        if ".lora_B.check" in name and p.any()
    }
    wanted = {name.split(".lora_")[0] for name in adapter.weights}
    if found != wanted:
        raise RuntimeError(f"{file}: reached {len(found & wanted)} of {len(wanted)} modules in diffusers")


@torch.inference_mode()
def probe_output(model: WanTransformer3DModel, base: Path, adapter: Adapter) -> Tensor:
    """The expert's output on fixed noise, at a noise level of its own interval."""
    interval = EXPERTS[adapter.expert].interval(boundary_ratio(base))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, len(latent_statistics(base)[0]), 1, 4, 4, generator=generator)
    text = torch.randn(1, 8, model.config.text_dim, generator=generator)
    t = torch.tensor([500.0 * (interval.low + interval.high)])
    return model(latents, t, text, return_dict=False)[0]
