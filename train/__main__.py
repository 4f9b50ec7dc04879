"""`accelerate launch -m train --config configs/pocket.toml [section.key=value ...]`."""

import argparse
import sys
from pathlib import Path

from wan_finetune.errors import InputError
from wan_finetune.settings import load_settings

from .signals import Stopped, StopRequest


def main() -> int:
    """Run the job; 0 when it is done, 2 for bad input, 3 when training broke down, 143 after a signal."""
    parser = argparse.ArgumentParser(
        prog="train", description="Train a LoRA for both experts of Wan2.2, preview, evaluate and export it."
    )
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/pocket.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file, values in TOML")
    arguments = parser.parse_args()
    try:
        stop = StopRequest()
        from .config import Config

        config = load_settings(Config, arguments.config, arguments.overrides)
        # The heavy imports wait until the configuration is known to be good.
        from .job import run

        run(config, stop)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on from here", file=sys.stderr)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
