"""Commands that make adapters out of adapters and models: merge, extract, resize, scale."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..operations.methods import METHODS
from .sample import one_or_two


def add_to(commands: Any) -> None:
    """Put the commands and their options into the parser."""
    source_help = "an adapter folder, a run's folder, or an adapter file"
    out_help = "folder for the new adapter, which must hold none yet"
    merging = commands.add_parser("merge", help="make one adapter of several")
    merging.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help=f"{source_help}; two or more")
    merging.add_argument("--weights", type=float, nargs="+", help="one for each source; 1 when left out")
    merging.add_argument(
        "--method",
        choices=METHODS,
        default="linear",
        help="linear is the exact sum; docs/operations.md",
    )
    merging.add_argument("--rank", type=int, help="of the methods that end in svd; the highest source's when left out")
    merging.add_argument("--density", type=float, help="share of the values that pruning methods keep, such as 0.5")
    merging.add_argument("--seed", type=int, default=0, help="of what the dare methods drop")
    merging.add_argument("--out", type=Path, required=True, help=out_help)
    merging.set_defaults(command=merge_command)
    extracting = commands.add_parser("extract", help="make an adapter of the difference between two models")
    extracting.add_argument("base", help='"pocket", a diffusers folder, or a Hub repository')
    extracting.add_argument("tuned", help="the fine-tuned model, in the same way")
    extracting.add_argument("--rank", type=int, required=True, help="the most that a module gets")
    extracting.add_argument(
        "--expert", choices=["high", "low", "single"], action="append", default=[], help="all when left out"
    )
    extracting.add_argument("--trigger", default="", help="the word that the model was tuned with, to be recorded")
    extracting.add_argument("--out", type=Path, required=True, help=out_help)
    extracting.set_defaults(command=extract_command)
    resizing = commands.add_parser("resize", help="lower an adapter's rank")
    resizing.add_argument("source", type=Path, help=source_help)
    how = resizing.add_mutually_exclusive_group(required=True)
    how.add_argument("--rank", type=int, help="the most that a module keeps")
    how.add_argument("--energy", type=float, help="or the share of each module's squared norm to keep, such as 0.95")
    resizing.add_argument("--out", type=Path, required=True, help=out_help)
    resizing.set_defaults(command=resize_command)
    scaling = commands.add_parser("scale", help="bake a strength into an adapter")
    scaling.add_argument("source", type=Path, help=source_help)
    scaling.add_argument("--strength", type=float, nargs="+", required=True, help="one number, or two (high low)")
    scaling.add_argument("--out", type=Path, required=True, help=out_help)
    scaling.set_defaults(command=scale_command)


def be_quiet() -> None:
    """Keep what libraries say on import out of the result."""
    from ..quiet import quiet_imports, quiet_libraries

    quiet_imports()
    quiet_libraries()


def say(lines: list[str]) -> None:
    """Print what an operation tells."""
    for line in lines:
        print(line)


def merge_command(arguments: argparse.Namespace) -> None:
    """Merge adapters into one folder."""
    from pydantic import ValidationError

    be_quiet()
    from ..operations.merging import MergeSettings, merge

    try:
        settings = MergeSettings(
            weights=arguments.weights or [1.0] * len(arguments.sources),
            method=arguments.method,
            rank=arguments.rank,
            density=arguments.density,
            seed=arguments.seed,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        told = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"--{problem['loc'][0]}: {told}" if problem["loc"] else told) from None
    say(merge(arguments.sources, arguments.out, settings))


def extract_command(arguments: argparse.Namespace) -> None:
    """Make an adapter of what a fine-tuning changed."""
    be_quiet()
    from ..operations.extracting import extract

    base, tuned, rank = arguments.base, arguments.tuned, arguments.rank
    experts = list(dict.fromkeys(arguments.expert))
    say(extract(base, tuned, arguments.out, rank=rank, experts=experts, trigger=arguments.trigger))


def resize_command(arguments: argparse.Namespace) -> None:
    """Lower ranks."""
    be_quiet()
    from ..operations.resizing import resize

    say(resize(arguments.source, arguments.out, rank=arguments.rank, energy=arguments.energy))


def scale_command(arguments: argparse.Namespace) -> None:
    """Bake a strength in."""
    be_quiet()
    from ..operations.scaling import scale

    say(scale(arguments.source, arguments.out, one_or_two(arguments.strength, "--strength")))
