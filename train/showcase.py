"""What a person sees of a run: previews midway and at the end, the evaluation, and the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from diffusers import WanPipeline

from data.batches import TrainingData
from data.inspection import Inspector
from data.samples import Sample
from data.viewing import window_frames
from wan_finetune.captions import compose
from wan_finetune.evaluation.compare import Comparison, compare, load_judge
from wan_finetune.evaluation.report import Curve, Panel, Report, write_report
from wan_finetune.pipeline import load_pipeline
from wan_finetune.sampling import Request, sample, write_clips

from .config import Config
from .records import JsonLines
from .terminal import progress_bar, say
from .tracking import Metrics

MOST_REFERENCES = 64
"""Brand clips that samples are compared with."""


def preview_requests(config: Config) -> list[Request]:
    """Preview prompts by seeds, the trigger in place."""
    return requests(config, config.sampling.prompts, config.sampling.seeds)


def requests(config: Config, prompts: Sequence[str], seeds: Sequence[int]) -> list[Request]:
    """Every prompt with every seed, composed with the trigger as captions are."""
    composed = [compose(prompt, config.data.trigger, config.data.caption) for prompt in prompts]
    return [Request(prompt=prompt, seed=seed) for prompt in composed for seed in seeds]


def midway_folder(config: Config) -> Path:
    return config.run_folder / "samples" / "midway"


def open_base(config: Config) -> WanPipeline:
    return load_pipeline(config.model.base, shift=config.sampling.shift, revision=config.model.revision)


def make_clips(config: Config, pipe: WanPipeline, wanted: Sequence[Request], label: str) -> list[np.ndarray]:
    with progress_bar(label, len(wanted)) as bar:
        return sample(pipe, wanted, config.sampling, bar.update)


def write(config: Config, folder: Path, kind: str, wanted: Sequence[Request], clips: list[np.ndarray]) -> list[Path]:
    names = [f"{number:02d}-{request.seed}-{kind}" for number, request in enumerate(wanted)]
    about = {"base": config.model.public_name, "kind": kind}
    return write_clips(folder, wanted, clips, names, config.sampling, about)


def show(config: Config, metrics: Metrics, data: TrainingData) -> None:
    """Sample base and exported adapter side by side, evaluate, and write the report."""
    folder = config.run_folder
    previews = preview_requests(config)
    trials = requests(config, config.evaluation.prompts, config.evaluation.seeds) or previews
    pipe = open_base(config)
    base = make_clips(config, pipe, [*previews, *trials], "samples of the base")
    del pipe
    pipe = load_pipeline(
        config.model.base, folder / "adapter", shift=config.sampling.shift, revision=config.model.revision
    )
    adapter = make_clips(config, pipe, [*previews, *trials], "samples with the adapter")
    shown = len(previews)
    final = folder / "samples" / "final"
    base_files = write(config, final / "base", "base", previews, base[:shown])
    adapter_files = write(config, final / "adapter", "adapter", previews, adapter[:shown])
    metrics.show_clips([*base_files, *adapter_files])
    brand = brand_samples(data)
    with Inspector(config.data.cache, config.data.decode_timeout_seconds) as inspector:
        reference = [window_frames(s, s.start_seconds[0], config.data.fps, inspector) for s in brand]
    figures = compare(
        base[shown:],
        adapter[shown:],
        reference,
        [request.prompt for request in trials],
        load_judge(config.evaluation.content),
    )
    (folder / "evaluation.json").write_text(
        json.dumps({**asdict(figures), "look_reduction": figures.look_reduction}, indent=1)
    )
    panels = [
        Panel(prompt=request.prompt, seed=request.seed, base=b, adapter=a)
        for request, b, a in zip(previews, base_files, adapter_files, strict=True)
    ]
    write_report(folder / "report.html", make_report(config, panels, figures, metrics, data, [s.path for s in brand]))
    tell(config, figures)


def brand_samples(data: TrainingData) -> list[Sample]:
    """Samples that show the brand's look, spread over the whole set: no regularisation, videos where there are any."""
    sources, stills = data.samples.column("source"), data.samples.column("still")
    look = np.array([not data.config.sources[int(source)].regularisation for source in sources])
    chosen = np.flatnonzero(look & ~stills if (look & ~stills).any() else look)
    places = np.unique(np.linspace(0, len(chosen) - 1, MOST_REFERENCES).round().astype(int))
    return [data.samples[int(chosen[place])] for place in places]


def make_report(
    config: Config,
    panels: list[Panel],
    figures: Comparison,
    metrics: Metrics,
    data: TrainingData,
    brand: list[Path],
) -> Report:
    """The report's content."""
    midway = [
        Panel(prompt=p.prompt, seed=p.seed, base=p.base, adapter=midway_folder(config) / p.adapter.name)
        for p in panels
        if (midway_folder(config) / p.adapter.name).is_file()
    ]
    held_out = JsonLines(config.run_folder / "validation.jsonl").lines()
    curves = [
        Curve(
            expert=name,
            steps=s,
            loss=loss,
            held_out=tuple((line["step"], line["loss"]) for line in held_out if line["expert"] == name),
        )
        for name in config.steps()
        for s, loss in [metrics.curve(name)]
    ]
    steps = ", ".join(f"{name} {count}" for name, count in config.steps().items())
    return Report(
        title=config.run.name,
        summary=f"{100 * figures.look_reduction:.0f} % of the distance to the brand look is gone",
        reference=brand[:8],
        panels=panels,
        midway=midway,
        curves=curves,
        figures=figures.figures(),
        facts={
            "Base": config.model.public_name,
            "Trigger": config.data.trigger or "none",
            "Clips": str(len(data.samples)),
            "Steps": steps,
            "LoRA": ", ".join(
                f"{name} rank {lora.rank}, alpha {lora.scale_alpha:g}"
                for name in config.steps()
                for lora in [config.expert(name).lora]
            ),
            "Sampling": f"{config.sampling.steps} steps, shift {config.sampling.shift:g}, guidance "
            f"{config.sampling.guidance_scale:g} / {config.sampling.guidance_scale_2:g}",
            "Seed": str(config.run.seed),
        },
    )


def tell(config: Config, figures: Comparison) -> None:
    """The result in a few lines at the terminal."""
    say(f"distance to the brand look: {figures.look_base:.2f} -> {figures.look_adapter:.2f}")
    for name, base in figures.content_base.items():
        say(f"right {name}: {base:.0%} -> {figures.content_adapter[name]:.0%}")
    say(f"report: {config.run_folder / 'report.html'}")
    say(f"adapter: {config.run_folder / 'adapter'}")
