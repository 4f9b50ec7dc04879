"""Commands on adapter files: pair, export, inspect."""

import argparse
from pathlib import Path
from typing import Any

MOST_TARGETS = 12
"""Targets that `inspect` names."""


def add_to(commands: Any) -> None:
    """Put the commands and their options into the parser."""
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


def pair_command(arguments: argparse.Namespace) -> None:
    """Join a high-noise and a low-noise adapter."""
    from ..pairing import pair, what_went_in

    for path in pair(arguments.high, arguments.low, arguments.out):
        print(path)
    for line in what_went_in(arguments.out, [arguments.high, arguments.low]):
        print(line)


def export_command(arguments: argparse.Namespace) -> None:
    """Convert the adapters of a folder."""
    from ..experts import EXPERTS
    from ..formats.reading import FORMATS
    from ..pipeline import read_adapters

    for adapter in read_adapters(arguments.source):
        path = arguments.out / EXPERTS[adapter.expert].file_name
        FORMATS[arguments.format].write(path, adapter)
        print(path)


def inspect_command(arguments: argparse.Namespace) -> None:
    """Print format, expert, rank, alpha, targets, effect and the recorded facts."""
    from ..adapters import update_norms
    from ..formats.reading import format_of, read_file

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
