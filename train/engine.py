"""The accelerator, checked: accelerate starts fewer processes than were asked for without a word."""

import os
from importlib.util import find_spec

from accelerate import Accelerator

from wan_finetune.errors import InputError

from .config import Config
from .tracking import log_folder


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and processes as launched.

    Raises:
        InputError: when the launcher asked for more processes than accelerate set up.
    """
    tracker = None if config.tracking.tracker == "none" else config.tracking.tracker
    if tracker and find_spec(tracker) is None:
        raise InputError(f'tracking.tracker = "{tracker}": not installed; pip install {tracker}, or set it to "none"')
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision, log_with=tracker, project_dir=str(log_folder(config))
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise InputError(
            f"the launcher asked for {asked} processes and accelerate runs {accelerator.num_processes} "
            f"({accelerator.distributed_type}); on a CPU start with: "
            f"ACCELERATE_USE_CPU=true torchrun --nproc-per-node {asked} -m train ..."
        )
    return accelerator
