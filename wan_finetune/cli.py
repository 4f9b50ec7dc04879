"""The command line `wan-finetune`."""

import argparse
import sys

from .commands import adapters, convert, operations, push, sample
from .errors import InputError

COMMANDS = (sample, adapters, operations, convert, push)
"""Modules of commands, in the order of `--help`; each has `add_to(commands)`."""


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
    for module in COMMANDS:
        module.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
