"""Samples on the way, so that a person sees the look arrive: midway, or after every round under a time budget."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wan_finetune.adapters import Adapter
from wan_finetune.experts import ExpertName
from wan_finetune.memory.levers import is_out_of_memory
from wan_finetune.pipeline import add_adapters

from .config import Config
from .rounds import Stretch
from .showcase import make_clips, midway_folder, open_base, preview_requests, write
from .state import ExpertState
from .terminal import say


class Previews:
    """Decides when there is a preview, and makes it. What it decides never moves the training."""

    def __init__(self, config: Config, show: Callable[[Sequence[Path]], None]) -> None:
        self.config, self.show = config, show
        self.began = time.monotonic()
        self.spent_seconds = self.last_seconds = 0.0

    def folder(self, stretch: Stretch, states: Mapping[ExpertName, ExpertState]) -> Path | None:
        """Where the preview after this stretch goes; None where there is none."""
        done, total = sum(state.step for state in states.values()), sum(self.config.steps().values())
        wish = self.config.train.previews
        if wish == "none" or done >= total:
            return None
        if done >= total / 2 and not midway_folder(self.config).is_dir():
            return midway_folder(self.config)
        target = self.config.run_folder / "samples" / f"step-{done:06d}"
        if wish == "midway" or stretch.expert != list(self.config.steps())[-1] or target.is_dir():
            return None
        allowed = self.config.train.preview_share * (time.monotonic() - self.began)
        return target if self.spent_seconds + self.last_seconds <= allowed else None

    def make(self, folder: Path, adapters: Sequence[Adapter]) -> None:
        """Sample the preview prompts with the adapters as they stand."""
        began = time.monotonic()
        try:
            if wanted := preview_requests(self.config):
                pipe = open_base(self.config)
                add_adapters(pipe, adapters)
                clips = make_clips(self.config, pipe, wanted, f"{folder.name} preview")
                self.show(write(self.config, folder, "adapter", wanted, clips))
        except RuntimeError as error:
            # A look on the way must not cost the run.
            if not is_out_of_memory(error):
                raise
            say(f'no {folder.name} preview: out of memory; training goes on (train.previews = "none" asks for none)')
        self.last_seconds = time.monotonic() - began
        self.spent_seconds += self.last_seconds
