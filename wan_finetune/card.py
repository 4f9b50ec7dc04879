"""The model card of an adapter: metadata that the Hub understands, and a code block that runs as it stands."""

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

from .card_texts import TEXTS, Language, Texts
from .errors import InputError
from .experts import EXPERTS, HIGH, SINGLE
from .hub_files import Artefacts, Clip
from .spec import NUM_TRAIN_TIMESTEPS

BOUNDARY = 0.875
"""The noise level from which the high-noise expert is called, of an adapter that does not say it: Wan2.2-T2V-A14B's."""
LICENSE = "apache-2.0"
"""Of an adapter that says none, unless another is named: that of Wan's models."""


def make_card(
    artefacts: Artefacts,
    *,
    repo: str | None = None,
    base: str | None = None,
    language: Language = "en",
    license: str | None = None,
    clips: Mapping[Path, str] | None = None,
) -> str:
    """A card as Markdown with its metadata in front.

    Args:
        repo: `user/repo` that the code loads from; left out: the folder that holds the card.
        base: the base model's name; left out: what the adapter says of itself.
        license: of the adapter, as the Hub names it; left out: what the adapter says of itself.
        clips: path of a clip -> its place beside the card; left out: `samples/NAME`.

    Raises:
        InputError: the adapter does not say of which base it is, and `base` does not either.
    """
    base = base or artefacts.about.get("base")
    if not base:
        raise InputError(
            f"{artefacts.adapter_folder}: does not say of which base it is; say it with --base, such as "
            "--base Wan-AI/Wan2.2-T2V-A14B-Diffusers"
        )
    license = license or artefacts.about.get("licence", LICENSE).lower()
    places = {
        path: (clips or {}).get(path, f"samples/{path.name}")
        for clip in artefacts.clips
        for path in (clip.adapter, clip.base)
        if path is not None
    }
    text = TEXTS[language]
    parts = [
        *head(artefacts, repo, base, text),
        *samples(artefacts, places, text),
        *use(artefacts, repo, base, text),
        *training(artefacts, text),
        *figures(artefacts, text),
        *(f"## {text.intended}", text.intended_text),
        *(f"## {text.safety}", text.safety_text),
        *(f"## {text.licence}", fill(text.licence_text, license=license, base=base)),
    ]
    return f"---\n{metadata(artefacts, places, base, license)}\n---\n\n" + "\n\n".join(parts) + "\n"


def metadata(artefacts: Artefacts, places: Mapping[Path, str], base: str, license: str) -> str:
    """The YAML in front. A base that is no repository of the Hub is left out, since a link to it would be dead."""
    from huggingface_hub import ModelCardData

    further: dict[str, Any] = {}
    if is_repository(base):
        further |= {"base_model": base, "base_model_relation": "adapter"}
    if trigger := artefacts.about.get("trigger"):
        further["instance_prompt"] = trigger
    if artefacts.clips:
        further["widget"] = [{"text": clip.prompt, "output": {"url": places[clip.adapter]}} for clip in artefacts.clips]
    tags = ["text-to-video", "lora", "diffusers", "template:diffusion-lora", "wan", "wan-finetune"]
    data = ModelCardData(
        language=["en", "zh"],
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-video",
        tags=tags,
        **further,
    )
    return data.to_yaml()


def is_repository(base: str) -> bool:
    """Whether a base's name is one on the Hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base))


def head(artefacts: Artefacts, repo: str | None, base: str, text: Texts) -> Iterator[str]:
    """Title, what it is, and the trigger word."""
    trigger = artefacts.about.get("trigger", "")
    name = repo.split("/")[1] if repo else trigger or "adapter"
    yield "# " + fill(text.title, name=one_line(name), base=short(base))
    experts = [EXPERTS[name] for name in artefacts.experts]
    if len(experts) == 2:
        boundary = NUM_TRAIN_TIMESTEPS * float(artefacts.about.get("boundary", BOUNDARY))
        yield fill(text.what_two, base=base, boundary=f"{boundary:g}")
    else:
        what = text.what_single if experts[0] == SINGLE else text.what_one_of_two
        yield fill(what, base=base, file=experts[0].file_name, component=experts[0].component)
    yield fill(text.trigger, trigger=trigger.replace("`", "'")) if trigger else text.no_trigger


def samples(artefacts: Artefacts, places: Mapping[Path, str], text: Texts) -> Iterator[str]:
    """Clips of the base beside those of the adapter."""
    if not artefacts.clips:
        return
    yield f"## {text.samples}"
    yield fill(text.sampled_with, sampling=sampling_line(artefacts))
    rows = [f"| {text.prompt} | {text.base} | {text.adapter} |", "|---|---|---|"]

    def video(path: Path | None) -> str:
        return f'<video src="{places[path]}" controls loop muted></video>' if path else ""

    rows += [f"| {cell(clip.prompt)} | {video(clip.base)} | {video(clip.adapter)} |" for clip in artefacts.clips]
    yield "\n".join(rows)


def sampling_line(artefacts: Artefacts) -> str:
    """How the clips were made, in numbers."""
    settings = artefacts.sampling
    guidance = f"{settings.guidance_scale:g}"
    if artefacts.experts[0] != "single":
        guidance += f" / {settings.guidance_scale_2:g}"
    return (
        f"{settings.width}x{settings.height}x{settings.num_frames}, {settings.fps:g} fps, UniPC, "
        f"{settings.steps} steps, shift {settings.shift:g}, guidance {guidance}"
    )


def use(artefacts: Artefacts, repo: str | None, base: str, text: Texts) -> Iterator[str]:
    """The code, and what to do in ComfyUI."""
    single = artefacts.experts == ("single",)
    yield f"## {text.use}"
    yield f"```python\n{code(artefacts, repo, base, text)}```"
    yield text.use_notes_single if single or len(artefacts.experts) == 1 else text.use_notes_two
    if repo:
        yield text.toolkit_use
        call = f"pipe = load_pipeline({literal(base)}, {literal(repo)})"
        yield f"```python\nfrom wan_finetune import load_pipeline\n\n{call}\n```"
    if artefacts.beside:
        yield f"## {text.comfyui}"
        one_of_two = text.comfyui_single if single else text.comfyui_one_of_two
        words = text.comfyui_two if len(artefacts.experts) == 2 else one_of_two
        yield fill(words, shift=f"{artefacts.sampling.shift:g}", expert=text.experts[artefacts.experts[0]])


def code(artefacts: Artefacts, repo: str | None, base: str, text: Texts) -> str:
    """Plain diffusers up to a clip: every expert's file in its place, shift and guidance as in the samples."""
    settings, single = artefacts.sampling, artefacts.experts == ("single",)
    imports = ["import torch", "from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline"]
    if base == "pocket":
        imports.insert(0, "from importlib.resources import files\n")
        where = 'str(files("wan_finetune") / "pocket" / "model")'
    else:
        where = literal(base) + ("" if is_repository(base) else f"  # {text.folder_of}")
    loads = []
    for name in artefacts.experts:
        second = ", load_into_transformer_2=True" if name == "low" else ""
        file = literal(EXPERTS[name].file_name)
        loads.append(f'pipe.load_lora_weights(adapter, weight_name={file}, adapter_name="brand"{second})')
    guidance = [f"    guidance_scale={settings.guidance_scale!r},"]
    if not single:
        guidance.append(f"    guidance_scale_2={settings.guidance_scale_2!r},")
    clip = artefacts.clips[0] if artefacts.clips else example(artefacts, text)
    negative = [f"    negative_prompt={literal(settings.negative_prompt)},"] if settings.negative_prompt else []
    lines = [
        *imports,
        "from diffusers.utils import export_to_video",
        "",
        f"base = {where}",
        f"adapter = {literal(repo)}" if repo else 'adapter = "."  # the folder that holds this card',
        "dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32",
        'vae = AutoencoderKLWan.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)',
        "pipe = WanPipeline.from_pretrained(base, vae=vae, torch_dtype=dtype)",
        f"pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift={settings.shift!r})",
        *loads,
        "if torch.cuda.is_available():",
        "    pipe.enable_model_cpu_offload()",
        "",
        "frames = pipe(",
        f"    {literal(clip.prompt)},",
        *negative,
        f"    width={settings.width},",
        f"    height={settings.height},",
        f"    num_frames={settings.num_frames},",
        f"    num_inference_steps={settings.steps},",
        *guidance,
        f"    generator=torch.Generator().manual_seed({clip.seed}),",
        ").frames[0]",
        f'export_to_video(frames, "clip.mp4", fps={settings.fps:g})',
    ]
    return "\n".join(lines) + "\n"


def example(artefacts: Artefacts, text: Texts) -> Clip:
    """A prompt for an adapter without samples."""
    trigger = artefacts.about.get("trigger", "")
    prompt = f"{trigger}, {text.example}" if trigger else text.example
    return Clip(prompt=prompt, seed=0, adapter=Path(HIGH.file_name), base=None)


def training(artefacts: Artefacts, text: Texts) -> Iterator[str]:
    """Facts of the training: an allow-list of what the files and the configuration say."""
    rows = [(text.facts[key], value) for key, value in facts(artefacts, text).items() if value]
    if rows:
        yield f"## {text.trained}"
        yield "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows)])


def facts(artefacts: Artefacts, text: Texts) -> dict[str, str]:
    """Name of a fact in `Texts.facts` -> its value; empty where it is not known."""
    tables, about = artefacts.configuration, artefacts.about
    optimizer, train, data = (tables.get(name, {}) for name in ("optimizer", "train", "data"))

    def of_experts(value: Any) -> str:
        said = [(text.experts[adapter.expert], value(adapter)) for adapter in artefacts.adapters]
        if artefacts.experts == ("single",):
            return str(said[0][1])
        return "; ".join(f"{name} {each}" for name, each in said if each)

    batch = train.get("batch_size", 0) * train.get("gradient_accumulation", 1)
    return {
        "lora": of_experts(
            lambda a: ("DoRA, " if a.dora else "rsLoRA, " if a.rslora else "") + f"rank {a.rank}, alpha {a.alpha:g}"
        ),
        "steps": of_experts(lambda a: a.about.get("steps", "")),
        "learning_rate": of_experts(lambda a: number(tables.get(a.expert, {}).get("learning_rate"))),
        "optimizer": ", ".join(str(optimizer[key]) for key in ("name", "schedule") if key in optimizer),
        "batch": "" if "batch_tokens" in train or not batch else str(batch),
        "precision": str(tables.get("model", {}).get("dtype", "")),
        "buckets": ", ".join(map(str, data.get("buckets", ()))) or about.get("resolution", ""),
        "training_shift": about.get("training_shift", ""),
        "fps": about.get("fps", ""),
        "seed": str(tables.get("run", {}).get("seed", "")),
        "toolkit": about.get("toolkit", ""),
    }


def figures(artefacts: Artefacts, text: Texts) -> Iterator[str]:
    """The evaluation, base beside adapter."""
    rows = list(figure_rows(artefacts, text))
    if rows:
        yield f"## {text.figures}"
        yield text.figures_note
        head = [f"| {text.figure} | {text.base} | {text.adapter} | |", "|---|---|---|---|"]
        yield "\n".join(
            head + [f"| {cell(name)} | {base} | {own} | {text.better[wish]} |" for name, base, own, wish in rows]
        )


def figure_rows(artefacts: Artefacts, text: Texts) -> Iterator[tuple[str, str, str, str]]:
    """Name, base, adapter, and which is better."""
    found, names = artefacts.evaluation, text.figure_names
    if {"look_base", "look_adapter"} <= found.keys():
        yield names["look"], number(found["look_base"]), number(found["look_adapter"]), "lower"
    for what, base in found.get("content_base", {}).items():
        own = found.get("content_adapter", {}).get(what)
        if own is not None:
            yield fill(names["content"], what=what), f"{base:.0%}", f"{own:.0%}", "higher"
    if "motion_kept" in found:
        yield names["motion"], "100%", f"{found['motion_kept']:.0%}", "same"
    for expert, (base, own) in artefacts.held_out.items():
        if expert in artefacts.experts:
            yield fill(names["held_out"], expert=text.experts[expert]), number(base), number(own), "lower"


def number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def short(base: str) -> str:
    """A base's name without its owner and without the format that it is in."""
    return base.rpartition("/")[2].removesuffix("-Diffusers")


def fill(template: str, **values: str) -> str:
    return Template(template).substitute(values)


def literal(text: str) -> str:
    """A Python string on one line: JSON's strings are of Python's."""
    return json.dumps(text, ensure_ascii=False)


def one_line(text: str) -> str:
    return " ".join(text.split())


def cell(text: str) -> str:
    """A text in a cell of a Markdown table: on one line, without marks of its own."""
    escaped = html.escape(one_line(text), quote=False)
    return re.sub(r"[|`*_\[\]\\]", lambda match: f"&#{ord(match[0])};", escaped)
