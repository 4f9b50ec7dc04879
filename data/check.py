"""`python -m data.check --config C [section.key=value ...]`: every clip looked at, before anything is trained."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan_finetune.decoding import Decoder

    from .check_files import Check
    from .checking import CheckConfig


def main() -> int:
    """Check and say what was found; 0 when all clips can be used, 1 when one cannot, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description="Look at every clip of a configuration before training."
    )
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/pocket.toml")
    parser.add_argument("--out", type=Path, default=Path("data_check"), help="folder for the page and the pictures")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file, values in TOML")
    arguments = parser.parse_args()
    # --help waits for nothing, and the decoding process imports its libraries beside this one.
    from wan_finetune.decoding import Decoder

    decoder = Decoder()
    decoder.begin()
    from wan_finetune.errors import InputError
    from wan_finetune.settings import load_settings

    from .checking import CheckConfig

    try:
        config = load_settings(CheckConfig, arguments.config, arguments.overrides)
        check = look(config, arguments.out, decoder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        decoder.close()
    if arguments.json:
        from dataclasses import asdict

        from .check_files import bucket_lines

        told = {
            "clips": [asdict(row) for row in check.rows],
            "buckets": [asdict(line) for line in bucket_lines(check.rows)],
            "findings": check.findings,
            "unusable": check.unusable,
        }
        print(json.dumps(told, ensure_ascii=False))
    else:
        tell(check, config, arguments.out)
    return 1 if check.unusable else 0


def look(config: "CheckConfig", out: Path, decoder: "Decoder") -> "Check":
    """Run the check behind a progress bar. Raises InputError."""
    from .checking import count_items, run_check, token_counter
    from .inspection import Inspector

    for old in (*(out / "sheets").glob("*.png"), *(out / "clips").glob("*.mp4")):
        old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    total = count_items(config.data) if sys.stderr.isatty() else None
    with Inspector(config.data.cache, config.data.decode_timeout_seconds, decoder) as inspector, bar(total) as advance:
        count_tokens = token_counter(config.model) if config.model.base else None
        return run_check(config, out, inspector, count_tokens, advance)


@contextmanager
def bar(total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal, to be called with the name of each clip that is done; nothing anywhere else."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("looking at the clips"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


def tell(check: "Check", config: "CheckConfig", out: Path) -> None:
    """The result at the terminal."""
    from .check_files import bucket_lines
    from .checking import source_names

    names = source_names(config.data)
    for row in check.rows:
        if not row.used:
            print(f"{'left out' if row.fault else 'passed over'}: {names[row.source]}{row.file}: {row.reason}")
    for level, clip, message in check.findings:
        print(f"{level}: {clip}: {message}")
    for line in bucket_lines(check.rows):
        print(f"{line.name}: {line.clips} clips, {line.samples} windows, {line.tokens:,} tokens each")
    print(f"{len(check.rows) - check.unusable} clips can be used, {check.unusable} cannot; {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
