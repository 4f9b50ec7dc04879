"""Writing a trained adapter folder, and proving that it loads elsewhere before saying so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from .adapters import Adapter
from .encoders import latent_statistics
from .experts import EXPERTS, base_folder, boundary_ratio, load_expert
from .facts import kept
from .formats import comfyui
from .formats import diffusers as diffusers_format


def write_adapter_folder(folder: Path, adapters: Sequence[Adapter], *, with_comfyui: bool = True) -> list[Path]:
    """Write each expert's file (`high_noise.safetensors`, ...) for diffusers, and the same under `comfyui/`.

    An adapter that ComfyUI's format cannot hold gets no file there, and a line says why; another says which facts are
    left out.
    """
    written = []
    for adapter in adapters:
        adapter.check(f"the adapter of {EXPERTS[adapter.expert].title}")
        name = EXPERTS[adapter.expert].file_name
        if left_out := sorted(adapter.about.keys() - kept(adapter.about).keys()):
            print(
                f"{name} does not say {', '.join(left_out)}: not a fact that files may hold, too long, or it looks "
                "like a path, an address or a token",
                flush=True,
            )
        diffusers_format.write(folder / name, adapter)
        written.append(folder / name)
        if not with_comfyui:
            continue
        if reason := comfyui.refusal(adapter):
            (folder / "comfyui" / name).unlink(missing_ok=True)
            print(f"no comfyui/{name}: {reason}", flush=True)
            continue
        comfyui.write(folder / "comfyui" / name, adapter)
        written.append(folder / "comfyui" / name)
    return written


def verify_adapter_folder(base: str, folder: Path, adapters: Sequence[Adapter], revision: str | None = None) -> None:
    """Load each file into a fresh expert through diffusers' own loader, and compare with the trained adapter.

    Each weight, rank and alpha must come back, every target of the model must have been reached, the update of each
    module must be the trained one, and the output must have changed. The ComfyUI file must give the same output as the
    diffusers one.

    Raises:
        RuntimeError: when a file is not what was trained; the message names it.
    """
    base_path = base_folder(base, [EXPERTS[a.expert].component for a in adapters], revision)
    for adapter in adapters:
        expert = EXPERTS[adapter.expert]
        require_equal(diffusers_format.read(folder / expert.file_name, adapter.expert), adapter, folder)
        outputs = {}
        files = {"diffusers": folder / expert.file_name, "comfyui": folder / "comfyui" / expert.file_name}
        for kind, file in files.items():
            if not file.is_file():
                continue
            model = load_expert(base_path, expert, torch.float32)
            reference = probe_output(model, base_path, adapter)
            load_with_diffusers(model, file)
            outputs[kind] = probe_output(model, base_path, adapter)
            if torch.equal(outputs[kind], reference):
                raise RuntimeError(f"{file}: loads, but changes nothing")
            if not torch.allclose(outputs[kind], outputs["diffusers"], rtol=1e-3, atol=1e-4):
                raise RuntimeError(f"{file}: gives another output than the diffusers file")
            require_every_target(model, adapter, file)


def require_equal(read_back: Adapter, adapter: Adapter, folder: Path) -> None:
    """What was read back is what was trained: weights to the bit, and of each module its scale."""
    same = (
        read_back.weights.keys() == adapter.weights.keys()
        and all(torch.equal(read_back.weights[name], value) for name, value in adapter.weights.items())
        and all(read_back.scale(module) == adapter.scale(module) for module in adapter.modules)
        and (read_back.alpha, read_back.rank, read_back.dora) == (adapter.alpha, adapter.rank, adapter.dora)
    )
    if not same:
        file = folder / EXPERTS[adapter.expert].file_name
        raise RuntimeError(f"{file}: what was read back is not what was trained")


def load_with_diffusers(model: WanTransformer3DModel, file: Path) -> None:
    """`WanPipeline.load_lora_weights`, on a pipeline that holds just this expert."""
    state, metadata = WanPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    WanPipeline.load_lora_into_transformer(state, transformer=model, adapter_name="check", metadata=metadata)


def require_every_target(model: WanTransformer3DModel, adapter: Adapter, file: Path) -> None:
    """Every module that was trained carries a LoRA now at the trained scale, none is missing, none is zero."""
    layers: dict[str, Any] = {
        name: part
        for name, part in model.named_modules()
        if hasattr(part, "lora_B") and "check" in part.lora_B and part.lora_B["check"].weight.any()
    }
    if layers.keys() != set(adapter.modules):
        reached = len(layers.keys() & set(adapter.modules))
        raise RuntimeError(f"{file}: reached {reached} of {len(adapter.modules)} modules in diffusers")
    for name, layer in layers.items():
        a, b = (adapter.weights[f"{name}.lora_{half}.weight"] for half in "AB")
        # What the update does to a vector tells it apart as well as the whole matrix would.
        vector = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0))
        loaded = layer.scaling["check"] * (layer.lora_B["check"].weight @ (layer.lora_A["check"].weight @ vector))
        wanted = adapter.scale(name) * (b @ (a @ vector))
        # diffusers folds a ComfyUI file's alpha into the weights, which rounds.
        if (loaded - wanted).norm() > 1e-4 * wanted.norm():
            raise RuntimeError(f"{file}: {name} has another update in diffusers than was trained")


@torch.inference_mode()
def probe_output(model: WanTransformer3DModel, base: Path, adapter: Adapter) -> Tensor:
    """The expert's output on fixed noise, at a noise level of its own interval."""
    interval = EXPERTS[adapter.expert].interval(boundary_ratio(base))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, len(latent_statistics(base)[0]), 1, 4, 4, generator=generator)
    text = torch.randn(1, 8, model.config.text_dim, generator=generator)
    t = torch.tensor([500.0 * (interval.low + interval.high)])
    return model(latents, t, text, return_dict=False)[0]
