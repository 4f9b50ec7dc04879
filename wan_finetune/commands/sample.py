"""`wan-finetune sample`: clips from a base model, with or without adapters."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError


def add_to(commands: Any) -> None:
    """Put the command and its options into the parser."""
    sampling = commands.add_parser("sample", help="make clips with a base model, with or without an adapter")
    sampling.add_argument("--base", required=True, help='"pocket", a diffusers folder, or a Hub repository')
    sampling.add_argument("--adapter", help="folder or Hub repository with the experts' two files")
    sampling.add_argument("--prompt", action="append", required=True, help="may be given several times")
    sampling.add_argument("--seed", type=int, action="append", help="may be given several times; default 0")
    sampling.add_argument("--strength", type=float, nargs="+", default=[1.0], help="of the adapter: one, or high low")
    sampling.add_argument("--out", type=Path, default=Path("samples"), help="folder for clips and manifest")
    sampling.add_argument("--size", default="832x480", help="width x height in pixels, multiples of 16")
    sampling.add_argument("--frames", type=int, default=81, help="4n+1")
    sampling.add_argument("--fps", type=float, default=16.0, help="frames a second of the file")
    sampling.add_argument("--steps", type=int, default=40, help="sampler steps")
    sampling.add_argument("--guidance", type=float, nargs="+", default=[4.0, 3.0], help="one, or high low")
    sampling.add_argument(
        "--shift",
        type=float,
        help="flow shift; default: what the adapter was previewed with, else the base's own (official: 12)",
    )
    sampling.add_argument("--negative", default="", help="what to steer away from")
    sampling.set_defaults(command=sample_command)


def one_or_two(values: list[float], name: str) -> tuple[float, float]:
    """One value for both experts, or (high, low)."""
    if len(values) > 2:
        raise InputError(f"{name} takes one number, or two (high low), got {len(values)}")
    return values[0], values[-1]


def sample_command(arguments: argparse.Namespace) -> None:
    """Make clips and write them with their manifest."""
    from pydantic import ValidationError

    from ..quiet import quiet_imports, quiet_libraries

    quiet_imports()
    from ..pipeline import load_pipeline
    from ..sampling import Request, SamplingSettings, sample, write_clips

    quiet_libraries()
    guidance = one_or_two(arguments.guidance, "--guidance")
    strength = one_or_two(arguments.strength, "--strength")
    width, _, height = arguments.size.partition("x")
    shift = arguments.shift
    pipe = load_pipeline(arguments.base, arguments.adapter, strength=strength, shift=shift)
    try:
        settings = SamplingSettings.model_validate(
            {
                "width": width,
                "height": height,
                "num_frames": arguments.frames,
                "fps": arguments.fps,
                "steps": arguments.steps,
                "guidance_scale": guidance[0],
                "guidance_scale_2": guidance[1],
                "shift": pipe.scheduler.config.flow_shift,
                "negative_prompt": arguments.negative,
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{problem['loc'][0]}: {problem['msg']}, got {problem['input']!r}") from None
    requests = [Request(prompt=p, seed=s) for p in arguments.prompt for s in arguments.seed or [0]]
    clips = sample(pipe, requests, settings, lambda done: print(f"{done}/{len(requests)} clips", flush=True))
    names = [f"{number:02d}-{request.seed}" for number, request in enumerate(requests)]
    about = {"base": Path(arguments.base).name, "adapter": Path(arguments.adapter or "none").name}
    for path in write_clips(arguments.out, requests, clips, names, settings, about):
        print(path)
