"""The command line `wan-finetune`: sample with adapters, pair and convert adapter files, and say what a file is."""

import argparse
import sys
from pathlib import Path

from .errors import InputError

MOST_TARGETS = 12
"""Targets that `inspect` names."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it is done, 2 for bad input."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="wan-finetune", description="Adapters for both experts of Wan2.2.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
    pairing = commands.add_parser("pair", help="join the adapters of two runs, one of each expert, into one folder")
    pairing.add_argument("high", type=Path, help="high-noise adapter: a file, an adapter folder, or a run's folder")
    pairing.add_argument("low", type=Path, help="low-noise adapter, in the same way")
    pairing.add_argument("--out", type=Path, required=True, help="folder for both, which must hold no adapter yet")
    pairing.set_defaults(command=pair_command)
    exporting = commands.add_parser("export", help="write an adapter folder in another format")
    exporting.add_argument("source", type=Path, help="adapter folder")
    exporting.add_argument("--format", choices=["diffusers", "comfyui"], required=True)
    exporting.add_argument("--out", type=Path, required=True, help="folder for the new files")
    exporting.set_defaults(command=export_command)
    inspecting = commands.add_parser("inspect", help="say what an adapter file is")
    inspecting.add_argument("file", type=Path)
    inspecting.add_argument(
        "--expert", choices=["high", "low", "single"], help="of a file that does not say whose it is"
    )
    inspecting.set_defaults(command=inspect_command)
    return parser


def one_or_two(values: list[float], name: str) -> tuple[float, float]:
    """One value for both experts, or (high, low)."""
    if len(values) > 2:
        raise InputError(f"{name} takes one number, or two (high low), got {len(values)}")
    return values[0], values[-1]


def sample_command(arguments: argparse.Namespace) -> None:
    """Make clips and write them with their manifest."""
    from pydantic import ValidationError

    from .quiet import quiet_imports, quiet_libraries

    quiet_imports()
    from .pipeline import load_pipeline
    from .sampling import Request, SamplingSettings, sample, write_clips

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


def pair_command(arguments: argparse.Namespace) -> None:
    """Join a high-noise and a low-noise adapter."""
    from .pairing import pair, what_went_in

    for path in pair(arguments.high, arguments.low, arguments.out):
        print(path)
    for line in what_went_in(arguments.out, [arguments.high, arguments.low]):
        print(line)


def export_command(arguments: argparse.Namespace) -> None:
    """Convert the adapters of a folder."""
    from .experts import EXPERTS
    from .formats.reading import FORMATS
    from .pipeline import read_adapters

    for adapter in read_adapters(arguments.source):
        path = arguments.out / EXPERTS[adapter.expert].file_name
        FORMATS[arguments.format].write(path, adapter)
        print(path)


def inspect_command(arguments: argparse.Namespace) -> None:
    """Print format, expert, rank, alpha, targets, effect and the recorded facts."""
    from .adapters import update_norms
    from .formats.reading import format_of, read_file

    adapter = read_file(arguments.file, arguments.expert)
    norms = update_norms(adapter)
    strongest = max(norms, key=lambda name: norms[name])
    kind = [name for name, is_so in {"DoRA": adapter.dora, "rsLoRA": adapter.rslora}.items() if is_so]
    ranks = sorted({adapter.rank, *adapter.ranks.values()})
    alphas = sorted({adapter.alpha, *adapter.alphas.values()})
    targets = [*adapter.targets[:MOST_TARGETS], *(["..."] if len(adapter.targets) > MOST_TARGETS else [])]
    facts = {
        "format": format_of(arguments.file),
        "kind": ", ".join(kind) or "LoRA",
        "expert": "single" if adapter.expert == "single" else f"{adapter.expert} noise",
        "rank": ", ".join(f"{rank}" for rank in ranks),
        "alpha": ", ".join(f"{alpha:g}" for alpha in alphas),
        "modules": f"{len(norms)} ({', '.join(targets)})",
        "update norm": f"{min(norms.values()):.3g} to {norms[strongest]:.3g} ({strongest})",
        **adapter.about,
    }
    for name, value in facts.items():
        print(f"{name:>16}  {value}")


if __name__ == "__main__":
    sys.exit(main())
