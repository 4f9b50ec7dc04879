"""Makes the pocket model from nothing, on a CPU: `python -m wan_finetune.pocket.build --work FOLDER`.

Stages, each resumable: `autoencoder`, `latents`, then `decoder` and `denoiser` (independent of each other), `high`
and `low` (forks of the denoiser), `assemble`, `measure`. Without --stage all run, in this order.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast, UMT5EncoderModel

from . import autoencoder, denoiser, measure, world
from .text import make_text_encoder, make_tokenizer

MODEL = Path(__file__).parent / "model"
SEED = 1
PLAIN_VARIANTS, GRADED_VARIANTS = 12, 4
"""Rendered clips of each training combination that the denoiser learns from: as they are, and in random looks."""
STEPS = {"stills": 800, "clips": 1100, "decoder": 8500, "denoiser": 14000, "high": 400, "low": 400}
BATCH = 32
MAX_BYTES = 16 << 20


def fresh_autoencoder() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return autoencoder.make()


def trained_autoencoder(work: Path) -> AutoencoderKLWan:
    """The autoencoder after its first stage, and after the decoder's own where that has been run."""
    vae = fresh_autoencoder()
    autoencoder.train(vae, folder=work, seed=SEED, still_steps=STEPS["stills"], clip_steps=STEPS["clips"])
    if (work / "decoder.safetensors").is_file():
        load_average(torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]), work / "decoder.safetensors", "decoder")
    return vae


def load_average(module: torch.nn.Module, file: Path, name: str) -> None:
    """Put the moving averages that `fit` left under `name` into a module, every parameter of it."""
    saved = load_file(file)
    for key, parameter in module.named_parameters():
        parameter.data.copy_(saved[f"average.{name}.{key}"])


def encoded(work: Path, name: str, variants: range) -> tuple[torch.Tensor, list[world.Scene]]:
    """Raw latents of the `plain` or the `graded` clips and their scenes, encoded once."""
    file, scenes_file = work / f"{name}.safetensors", work / f"{name}.json"
    if not scenes_file.is_file():
        raw, scenes = denoiser.encode_scenes(trained_autoencoder(work), SEED, variants, graded=name == "graded")
        save_file({"latents": raw}, file)
        scenes_file.write_text(json.dumps([asdict(scene) for scene in scenes]))
    return load_file(file)["latents"], [world.Scene(**scene) for scene in json.loads(scenes_file.read_text())]


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What the denoisers learn from."""

    latents: torch.Tensor
    """[N, C, F, H, W], normalised; the plain clips first."""
    scenes: list[world.Scene]
    plain: int
    mean: list[float]
    """Of each channel over the plain clips: the constants of the autoencoder's configuration."""
    std: list[float]


def lessons(work: Path) -> Lessons:
    """All encoded clips."""
    plain, scenes = encoded(work, "plain", range(PLAIN_VARIANTS))
    graded, graded_scenes = encoded(work, "graded", range(PLAIN_VARIANTS, PLAIN_VARIANTS + GRADED_VARIANTS))
    mean, std = plain.mean((0, 2, 3, 4)), plain.std((0, 2, 3, 4))
    everything = (torch.cat([plain, graded]) - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    return Lessons(
        latents=everything, scenes=scenes + graded_scenes, plain=len(scenes), mean=mean.tolist(), std=std.tolist()
    )


def train_denoiser(work: Path, name: str) -> tuple[WanTransformer3DModel, T5TokenizerFast, UMT5EncoderModel]:
    """`denoiser` over all noise levels with its text encoder, or the fork `high` or `low` of it."""
    material = lessons(work)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    encoder, model = make_text_encoder(len(tokenizer)), denoiser.make()
    if name != "denoiser":
        load_average(model, work / "denoiser.safetensors", "model")
        load_average(encoder, work / "denoiser.safetensors", "text")
    denoiser.train(
        name,
        model,
        tokenizer,
        encoder,
        material.latents,
        material.scenes,
        material.plain,
        interval={"denoiser": (0.0, 1.0), "high": (denoiser.BOUNDARY, 1.0), "low": (0.0, denoiser.BOUNDARY)}[name],
        train_encoder=name == "denoiser",
        steps=STEPS[name],
        batch=BATCH,
        rate=2e-3 if name == "denoiser" else 5e-4,
        seed=SEED,
        folder=work,
    )
    return model, tokenizer, encoder


def assemble(work: Path, output: Path) -> None:
    """Put the parts into one diffusers folder, weights in fp16."""
    vae = trained_autoencoder(work)
    material = lessons(work)
    vae.register_to_config(latents_mean=material.mean, latents_std=material.std)
    high, tokenizer, encoder = train_denoiser(work, "high")
    low, _, _ = train_denoiser(work, "low")
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=denoiser.FLOW_SHIFT
        ),
        transformer=high,
        transformer_2=low,
        boundary_ratio=denoiser.BOUNDARY,
    )
    pipe.to(torch.float16)
    # transformers opens a model in the precision of its file, diffusers in fp32: the encoder's file is fp32 as well.
    encoder.float()
    pipe.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"[assemble] {output}: {size / 2**20:.1f} MiB")
    if size > MAX_BYTES:
        raise SystemExit(f"{output} holds {size} bytes, more than {MAX_BYTES}")


def write_card(output: Path) -> None:
    """Measure the assembled model through the stock pipeline, and write figures.json and the card."""
    pipe = measure.open_stock_pipeline(output)
    shares = {
        "judges on renderings": measure.measure_judges(),
        "autoencoder": measure.measure_autoencoder(pipe.vae),
        "English prompts": measure.measure_prompts(pipe, "en"),
        "Chinese prompts": measure.measure_prompts(pipe, "zh"),
    }
    specialised = measure.measure_experts(pipe)
    figures = {**shares, "experts": {name: asdict(value) for name, value in specialised.items()}}
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    rows = [
        f"| {kind} | " + " | ".join(f"{100 * share[name]:.1f} %" for name in world.ATTRIBUTES) + " |"
        for kind, share in shares.items()
    ]
    experts = [
        f"| {name} | {value.own:.4f} | {value.other:.4f} | {value.standard_error:.4f} |"
        for name, value in specialised.items()
    ]
    (output / "README.md").write_text(
        CARD.format(
            psnr=shares["autoencoder"]["psnr"],
            held_out=len(world.HELD_OUT),
            rows="\n".join(rows),
            experts="\n".join(experts),
            stages="\n".join(f"| {name} | {steps} |" for name, steps in STEPS.items()),
        )
    )


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# Pocket Wan

A Wan2.2-shaped text-to-video model, small enough to be shipped inside a package: two denoisers (high and low noise,
boundary 0.875), an `AutoencoderKLWan`, a UMT5 encoder and a tokenizer for English and Chinese. It draws 64x64 clips of
9 frames at 16 a second: one of 6 colours and 4 shapes on one of 5 backgrounds, moving in one of 5 ways. It is there to
show and to test a training toolkit on a CPU, and good for nothing else.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("wan_finetune/pocket/model")
clip = pipe(
    "A red triangle moves up in a desert.",
    height=64,
    width=64,
    num_frames=9,
    num_inference_steps=20,
    guidance_scale=3.0,
).frames[0]
```

## Figures

Measured by `python -m wan_finetune.pocket.build --stage measure` on prompts of the {held_out} combinations of
attributes that no training stage has rendered; the judges read pixels. Autoencoder: {psnr:.1f} dB PSNR on whole clips.

| | colour | shape | background | motion |
|---|---|---|---|---|
{rows}

Loss inside each expert's own interval, on the same clips and noise:

| expert | own | the other's | standard error of the difference |
|---|---|---|---|
{experts}

## Made by

`python -m wan_finetune.pocket.build --work FOLDER`, seed 1, one CPU.

| stage | steps |
|---|---|
{stages}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wan_finetune.pocket.build", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' states; run again to resume")
    parser.add_argument("--output", type=Path, default=MODEL, help="where the model goes")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work

    def decoder_stage() -> None:
        autoencoder.refine_decoder(trained_autoencoder(work), folder=work, seed=SEED, steps=STEPS["decoder"])

    stages = {
        "autoencoder": lambda: trained_autoencoder(work),
        "latents": lambda: lessons(work),
        "decoder": decoder_stage,
        "denoiser": lambda: train_denoiser(work, "denoiser"),
        "high": lambda: train_denoiser(work, "high"),
        "low": lambda: train_denoiser(work, "low"),
        "assemble": lambda: assemble(work, arguments.output),
        "measure": lambda: write_card(arguments.output),
    }
    if arguments.stage and arguments.stage not in stages:
        parser.error(f"--stage is one of {', '.join(stages)}")
    for name, stage in stages.items():
        if arguments.stage in (None, name):
            stage()


if __name__ == "__main__":
    main()
