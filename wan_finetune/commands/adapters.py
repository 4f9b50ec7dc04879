"""Commands on adapter files: pair, export, inspect."""

import argparse
from pathlib import Path
from typing import Any

from ..formats import FORMAT_NAMES
from .merged import add_merged_options, export_merged

MERGED = "merged"
"""No format of adapters: the base's full weights with them in."""
EXPERT_HELP = "whose adapter is taken; of a file that does not say it, whose it is"
ALPHA_HELP = "of a file that says none, such as one of VideoX-Fun's; left out, it is taken as the rank"


def add_to(commands: Any) -> None:
    """Put the commands and their options into the parser."""
    pairing = commands.add_parser("pair", help="join the adapters of two runs, one of each expert, into one folder")
    pairing.add_argument("high", type=Path, help="high-noise adapter: a file, an adapter folder, or a run's folder")
    pairing.add_argument("low", type=Path, help="low-noise adapter, in the same way")
    pairing.add_argument("--out", type=Path, required=True, help="folder for both, which must hold no adapter yet")
    pairing.set_defaults(command=pair_command)
    exporting = commands.add_parser("export", help="write adapters in another format")
    exporting.add_argument("source", type=Path, help="adapter file or folder of any format, or a repository of the Hub")
    exporting.add_argument("--format", choices=[*FORMAT_NAMES, MERGED], required=True)
    exporting.add_argument("--out", type=Path, required=True, help="folder for the new files")
    add_reading_options(exporting)
    add_merged_options(exporting)
    exporting.set_defaults(command=export_command)
    inspecting = commands.add_parser("inspect", help="say what adapter files are, and whether they are sane")
    inspecting.add_argument("file", type=Path, help="a file, an adapter folder, or a run's folder")
    add_reading_options(inspecting)
    inspecting.add_argument("--layers", action="store_true", help="the update's norm in every block and Linear")
    inspecting.add_argument("--json", action="store_true", help="for programs")
    inspecting.set_defaults(command=inspect_command)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Options for what another tool's file leaves out."""
    parser.add_argument("--expert", choices=["high", "low", "single"], help=EXPERT_HELP)
    parser.add_argument("--alpha", type=float, help=ALPHA_HELP)


def require_alpha(alpha: float | None) -> None:
    """Whether a scale can be made of it."""
    from ..errors import InputError

    if alpha is not None and not 0 < alpha < float("inf"):
        raise InputError(f"--alpha {alpha:g}: must be a number above 0, such as the network_alpha of the training")


def pair_command(arguments: argparse.Namespace) -> None:
    """Join a high-noise and a low-noise adapter."""
    from ..pairing import pair, what_went_in

    for path in pair(arguments.high, arguments.low, arguments.out):
        print(path)
    for line in what_went_in(arguments.out, [arguments.high, arguments.low]):
        print(line)


def export_command(arguments: argparse.Namespace) -> None:
    """Write a source's adapters in a format."""
    from ..formats.exporting import export
    from ..formats.reading import FORMATS, read_all
    from ..pipeline import adapter_source

    require_alpha(arguments.alpha)
    adapters = read_all(adapter_source(arguments.source), arguments.expert, arguments.alpha)
    if arguments.format == MERGED:
        print("\n".join(export_merged(arguments, adapters)))
        return
    file_format = FORMATS[arguments.format]
    for path in export(adapters, file_format, arguments.out):
        print(path)
    for adapter in adapters:
        for note in (*adapter.assumed, file_format.caveat(adapter)):
            if note:
                print(f"note: {adapter.expert}: {note}")


def inspect_command(arguments: argparse.Namespace) -> None:
    """Print what each file is; end with what is wrong, if something is."""
    import json

    from ..errors import InputError
    from ..formats.inspection import as_json, as_lines, inspect_all

    require_alpha(arguments.alpha)
    results = inspect_all(arguments.file, arguments.expert, arguments.alpha)
    faults = [result for result in results if isinstance(result, InputError)]
    if arguments.json:
        said = [
            {"sane": False, "reason": str(result)}
            if isinstance(result, InputError)
            else as_json(result, layers=arguments.layers)
            for result in results
        ]
        print(json.dumps({"adapters": said}, indent=2, ensure_ascii=False))
    else:
        for result in results:
            if isinstance(result, InputError):
                continue
            if len(results) > 1:
                print(result.path)
            print("\n".join(as_lines(result, layers=arguments.layers)))
    if faults:
        raise InputError("\n".join(map(str, faults)))
