"""`python -m train.precompute --config C [section.key=value ...]`: fill the caches and stop."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wan_finetune.errors import InputError
from wan_finetune.quiet import quiet_imports, quiet_libraries
from wan_finetune.settings import load_settings

from .ranks import complain, say_stopped
from .signals import Stopped, StopRequest
from .terminal import say

if TYPE_CHECKING:
    from data.batches import TrainingData


def prune(data: "TrainingData", older_than_days: float) -> None:
    """Remove from the caches what `data` does not use and nobody has read for some days."""
    for kind, keys in data.used_keys().items():
        files, size_bytes = data.cache.prune(kind, keys, older_than_days)
        say(f"{kind}: removed {files} files, {size_bytes / 2**20:.1f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.precompute", description="Fill the caches and stop.")
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/pocket.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file")
    parser.add_argument(
        "--prune-days",
        type=float,
        metavar="N",
        help="then remove entries that this configuration does not use and nothing has read for N days",
    )
    arguments = parser.parse_args()
    try:
        StopRequest()
        from .config import Config

        config = load_settings(Config, arguments.config, arguments.overrides)
        # The heavy imports wait until the configuration is known to be good.
        quiet_imports()
        from .engine import make_accelerator
        from .preparing import prepare_data

        quiet_libraries()
        accelerator = make_accelerator(config)
        data = prepare_data(config, accelerator)
        if arguments.prune_days is not None and accelerator.is_main_process:
            prune(data, arguments.prune_days)
    except InputError as error:
        complain(error)
        return 2
    except Stopped as stopped:
        say_stopped(stopped)
        return stopped.exit_code
    say(f"the caches in {config.data.cache} hold all {len(data.samples)} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
