"""`accelerate launch -m train --config configs/pocket.toml [section.key=value ...]`."""

import argparse
import errno
import shutil
import sys
from pathlib import Path

from wan_finetune.errors import InputError
from wan_finetune.quiet import quiet_imports
from wan_finetune.settings import load_settings

from .ranks import complain, say_stopped
from .signals import Stopped, StopRequest, report_status

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> int:
    """Run the job; 0 when it is done, 2 for bad input, 3 when training broke down, 143 after a signal."""
    parser = argparse.ArgumentParser(
        prog="train", description="Train a LoRA for both experts of Wan2.2, preview, evaluate and export it."
    )
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/pocket.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file, values in TOML")
    arguments = parser.parse_args()
    status = 1
    try:
        status = train(arguments.config, arguments.overrides)
    finally:
        report_status(status)
    return status


def train(path: Path, overrides: list[str]) -> int:
    """The job of a configuration file, its errors told in one line each."""
    try:
        stop = StopRequest()
        stop.insist()
        from .config import Config

        config = load_settings(Config, path, overrides)
        # The heavy imports wait until the configuration is known to be good.
        quiet_imports()
        from .job import run

        try:
            run(config, stop)
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise InputError(disk_is_full(error, config.run_folder)) from error
    except InputError as error:
        complain(error)
        return 2
    except FloatingPointError as error:
        complain(error)
        return 3
    except Stopped as stopped:
        say_stopped(stopped)
        return stopped.exit_code
    return 0


def disk_is_full(error: OSError, folder: Path) -> str:
    where = Path(error.filename) if error.filename else folder
    nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return (
        f"{where}: {error.strerror}; {shutil.disk_usage(nearest).free} bytes are free in {nearest}. Checkpoints are "
        "whole. Make room and run the same command again"
    )


if __name__ == "__main__":
    sys.exit(main())
