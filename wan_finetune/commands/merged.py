"""`wan-finetune export --format merged`: the options, and what is done with them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .sample import one_or_two

if TYPE_CHECKING:
    from ..adapters import Adapter


def add_merged_options(parser: argparse.ArgumentParser) -> None:
    """Put the options of this format into the parser of `export`, which has `--out`."""
    group = parser.add_argument_group("options of --format merged")
    group.add_argument("--base", help='of the adapter: "pocket", a diffusers folder, or a Hub repository')
    group.add_argument("--revision", help="of a Hub repository")
    group.add_argument("--strength", type=float, nargs="+", default=[1.0], help="one number, or two (high low)")
    group.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the merged weights")
    group.add_argument("--copy", action="store_true", help="copy the other components instead of linking them")


def export_merged(arguments: argparse.Namespace, adapters: "Sequence[Adapter]") -> list[str]:
    """Merge adapters into the base that the options name; returns what to tell the user.

    Raises:
        InputError: for options that are missing or odd, and as `write_merged` does.
    """
    from ..experts import base_folder
    from ..formats.merged import DTYPES, components_of, write_merged

    if not arguments.base:
        raise InputError("--format merged needs --base, the model that the adapter is merged into")
    strengths = one_or_two(arguments.strength, "--strength")
    folder = base_folder(arguments.base, (), arguments.revision)
    folder = base_folder(arguments.base, components_of(folder), arguments.revision)
    return write_merged(
        folder,
        adapters,
        arguments.out,
        dtype=DTYPES[arguments.dtype],
        strengths=strengths,
        name=Path(arguments.base).name if Path(arguments.base).is_dir() else arguments.base,
        link=not arguments.copy,
    )
