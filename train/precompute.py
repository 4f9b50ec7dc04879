"""Filling the caches: `python -m train.precompute --config C`, and the first part of every run."""

import argparse
import gc
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from data.batches import TrainingData
from data.cache import Cache
from data.clips import Clip, find_clips
from data.samples import precompute
from wan_finetune.encoders import TextEncoder, VideoEncoder
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder, fingerprint
from wan_finetune.quiet import quiet_libraries
from wan_finetune.settings import load_settings

from .config import Config
from .engine import make_accelerator
from .signals import Stopped, StopRequest
from .tracking import progress_bar, say

ENCODERS = ("vae", "text_encoder", "tokenizer")


def prepare_data(config: Config, accelerator: Accelerator) -> tuple[list[Clip], TrainingData]:
    """Find the clips, report on each, encode what is not in the cache, and let the encoders go."""
    folder = config.run_folder
    clips, rows = find_clips(config.data)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data_report.jsonl").write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    used = sum(row.used for row in rows)
    say(f"{used} clips, {len(rows) - used} files left out; a line for each in {folder / 'data_report.jsonl'}")
    base = base_folder(config.model.base, ENCODERS, config.model.revision)
    cache = Cache(config.data.cache)
    dtype = getattr(torch, config.model.dtype)
    text_fingerprint = fingerprint(base / "text_encoder") + fingerprint(base / "tokenizer") + config.model.dtype
    encoders = Encoders(base, accelerator.device, dtype)
    names = {"text": "encoding captions", "latent": "encoding clips"}
    with progress_bar("reading the caches", 1) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if bar.label != names[stage]:
                bar.restart(names[stage], total)
            bar.update(done)

        samples = precompute(
            clips,
            cache,
            fps=config.data.fps,
            video_fingerprint=fingerprint(base / "vae"),
            text_fingerprint=text_fingerprint,
            encode_video=encoders.video,
            encode_text=encoders.text,
            progress=progress,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        if bar.label not in names.values():
            bar.update(1, "nothing is missing")
    accelerator.wait_for_everyone()
    return clips, TrainingData(samples, cache, text_fingerprint=text_fingerprint)


class Encoders:
    """Both encoders, each loaded when it is first needed: with full caches that is never."""

    def __init__(self, base: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device, self.dtype = base, device, dtype
        self.loaded_text: TextEncoder | None = None
        self.loaded_video: VideoEncoder | None = None

    def text(self, caption: str) -> torch.Tensor:
        if self.loaded_text is None:
            self.loaded_text = TextEncoder(self.base, self.device, self.dtype)
        return self.loaded_text(caption)

    def video(self, frames: np.ndarray) -> torch.Tensor:
        if self.loaded_video is None:
            self.loaded_text = None
            gc.collect()
            self.loaded_video = VideoEncoder(self.base, self.device)
        return self.loaded_video(frames)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.precompute", description="Fill the caches and stop.")
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/pocket.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file")
    arguments = parser.parse_args()
    try:
        StopRequest()
        config = load_settings(Config, arguments.config, arguments.overrides)
        quiet_libraries()
        _, data = prepare_data(config, make_accelerator(config))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on from here", file=sys.stderr)
        return stopped.exit_code
    say(f"the caches in {config.data.cache} hold all {len(data.samples)} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
