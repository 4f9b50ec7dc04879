"""What a fresh process finds in exported files: diffusers, PEFT and this toolkit, beside each other."""

import json
from pathlib import Path

import torch
from diffusers import WanPipeline
from peft import PeftModel
from safetensors.torch import load_file

from wan_finetune.adapters import Adapter
from wan_finetune.experts import EXPERTS, Expert, load_expert
from wan_finetune.export import probe_output
from wan_finetune.formats.peft import PREFIX
from wan_finetune.formats.reading import read_expert, read_file
from wan_finetune.pipeline import add_adapters

BY_DIFFUSERS = ("diffusers", "comfyui", "kohya")


def scales_of(model: torch.nn.Module, name: str) -> dict[str, float]:
    """Scale of each module that carries a LoRA which is not zero."""
    return {
        module: layer.scaling[name]
        for module, layer in model.named_modules()
        if hasattr(layer, "lora_B") and name in layer.lora_B and layer.lora_B[name].weight.any()
    }


def bare_pipeline(base: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(base, vae=None, text_encoder=None, tokenizer=None)


def by_diffusers(base: Path, folder: Path, expert: Expert, adapter: Adapter) -> dict:
    """`load_lora_weights` as a user calls it."""
    pipe = bare_pipeline(base)
    second = {"load_into_transformer_2": True} if expert.name == "low" else {}
    pipe.load_lora_weights(folder, weight_name=expert.file_name, adapter_name="it", **second)
    model = getattr(pipe, expert.component)
    return {"scales": scales_of(model, "it"), "output": probe_output(model, base, adapter)}


def by_peft(base: Path, folder: Path, expert: Expert, adapter: Adapter) -> dict:
    """`PeftModel.from_pretrained` as a user calls it; every key of the file must have been taken."""
    path = folder / ("single" if expert.name == "single" else f"{expert.name}_noise")
    model = PeftModel.from_pretrained(load_expert(base, expert, torch.float32), path).eval()
    held = {name.removeprefix(PREFIX) for name in load_file(path / "adapter_model.safetensors")}
    found = {
        name.removeprefix(PREFIX).replace(".default", "").removesuffix("_vector.weight")
        + "_vector" * ("magnitude" in name)
        for name in model.state_dict()
        if ".lora_" in name
    }
    assert found == held, sorted(found ^ held)
    inner = model.get_base_model()
    return {"scales": scales_of(inner, "default"), "output": probe_output(inner, base, adapter)}


def by_us(base: Path, folder: Path, expert: Expert, adapter: Adapter) -> dict:
    """What `load_pipeline` does with adapters, of any format."""
    pipe = bare_pipeline(base)
    add_adapters(pipe, [read_expert(folder, expert.name)])
    model = getattr(pipe, expert.component)
    return {"scales": scales_of(model, "brand"), "output": probe_output(model, base, adapter)}


def check(bases: dict[str, Path], root: Path, report: Path) -> int:
    """Load every case's files in every way that they are meant for, and write down what was found.

    Args:
        bases: number of denoisers, `1` or `2` -> base.
        root: a folder a case, in it `EXPERT/FORMAT/...` and what was exported as `EXPERT/adapter.safetensors`.
    """
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    plain: dict[str, torch.Tensor] = {}
    for place in sorted(root.glob("*/*")):
        expert = EXPERTS[place.name]
        base = bases["1" if expert.name == "single" else "2"]
        adapter = read_file(place / "adapter.safetensors", expert.name)
        if expert.name not in plain:
            plain[expert.name] = probe_output(load_expert(base, expert, torch.float32), base, adapter)
        reference = by_us(base, place / "diffusers", expert, adapter)
        wanted = {module: adapter.scale(module) for module in adapter.modules}
        for folder in sorted(p for p in place.iterdir() if p.is_dir()):
            ways = {"us": by_us}
            ways |= {"diffusers": by_diffusers} if folder.name in BY_DIFFUSERS else {}
            ways |= {"peft": by_peft} if folder.name == "peft" else {}
            for way, load in ways.items():
                try:
                    said = load(base, folder, expert, adapter)
                except Exception as error:
                    found[f"{place.parent.name} {expert.name} {folder.name} {way}"] = {"error": repr(error)}
                    continue
                exact = (way == "us" and folder.name != "original") or folder.name in ("diffusers", "peft")
                found[f"{place.parent.name} {expert.name} {folder.name} {way}"] = {
                    "matched": said["scales"].keys() == wanted.keys(),
                    "scale_error": max(abs(said["scales"][m] / wanted[m] - 1) for m in wanted) if exact else 0.0,
                    "difference": float((said["output"] - reference["output"]).abs().max()),
                    "change": float((said["output"] - plain[expert.name]).abs().max()),
                }
    report.write_text(json.dumps(found))
    return 0
