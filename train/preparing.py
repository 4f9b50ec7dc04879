"""The first part of every run: clips found, reported on and encoded, the encoders gone."""

import gc
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.batches import TrainingData
from data.cache import Cache
from data.filling import Filling
from data.holdout import hold_out
from data.inspection import Inspector
from data.samples import SampleTable
from data.survey import Survey, leave_out_unencoded, require_sources, take_survey
from wan_finetune.encoders import TextEncoder, VideoEncoder
from wan_finetune.experts import base_folder, fingerprint

from .config import Config
from .terminal import Bar, progress_bar, say

ENCODERS = ("vae", "text_encoder", "tokenizer")


def prepare_data(config: Config, accelerator: Accelerator) -> TrainingData:
    """Find the clips, report on each, encode what is not in the cache, and let the encoders go."""
    base = base_folder(config.model.base, ENCODERS, config.model.revision)
    video_fingerprint = fingerprint(base / "vae")
    text_fingerprint = fingerprint(base / "text_encoder") + fingerprint(base / "tokenizer") + config.model.dtype
    cache = Cache(config.data.cache)
    encoders = Encoders(base, accelerator.device, getattr(torch, config.model.dtype), config.data.latent_std)
    report = config.run_folder / "data_report.jsonl"
    survey: Survey | None = None
    if accelerator.is_main_process:
        require_sources(config.data)
    with Inspector(config.data.cache, config.data.decode_timeout_seconds) as inspector:
        if accelerator.is_main_process:
            report.parent.mkdir(parents=True, exist_ok=True)
            survey = take_survey(config.data, inspector, report, video_fingerprint)
        samples = SampleTable(from_main_process(survey))
        with progress_bar("reading the caches", 1) as bar:
            Filling(
                samples=samples,
                cache=cache,
                inspector=inspector,
                fps=config.data.fps,
                video_fingerprint=video_fingerprint,
                text_fingerprint=text_fingerprint,
                encode_video=encoders.video,
                encode_text=encoders.text,
                progress=lambda stage, done, total: show_progress(bar, stage, done, total),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            ).run()
            if bar.label not in STAGES.values():
                bar.update(1, "nothing is missing")
        accelerator.wait_for_everyone()
        if survey is not None:
            survey = leave_out_unencoded(config.data, survey, cache, inspector)
            short = f", {survey.passed_over} shots too short" if survey.passed_over else ""
            say(f"{survey.used} clips, {len(survey.faults)} left out{short}; a line for each in {report}")
        samples = SampleTable(from_main_process(survey))
    held_out = hold_out(samples, config.data, config.validation.clips if config.validation.every_steps else 0)
    if held_out.any() and accelerator.is_main_process:
        names = sorted({samples[int(index)].clip for index in held_out.nonzero()[0]})
        say(f"kept from training, for the held-out loss (validation.clips): {', '.join(names)}")
    elif config.validation.every_steps:
        say("no clip is kept from training, as a tenth of so few is none: there will be no held-out loss")
    return TrainingData(samples, cache, config.data, text_fingerprint=text_fingerprint, held_out=held_out)


def from_main_process(survey: Survey | None) -> Path:
    """The table of samples that the main process has written, in every process."""
    files = [survey.samples if survey is not None else None]
    broadcast_object_list(files)
    assert files[0] is not None
    return files[0]


STAGES = {"text": "encoding captions", "latent": "encoding clips", "mask": "reading masks"}


def show_progress(bar: Bar, stage: str, done: int, total: int) -> None:
    if bar.label != STAGES[stage]:
        bar.restart(STAGES[stage], total)
    bar.update(done)


class Encoders:
    """Both encoders, each loaded when it is first needed: with full caches that is never."""

    def __init__(self, base: Path, device: torch.device, dtype: torch.dtype, with_std: bool) -> None:
        self.base, self.device, self.dtype, self.with_std = base, device, dtype, with_std
        self.loaded_text: TextEncoder | None = None
        self.loaded_video: VideoEncoder | None = None

    def text(self, caption: str) -> torch.Tensor:
        if self.loaded_text is None:
            self.loaded_text = TextEncoder(self.base, self.device, self.dtype)
        return self.loaded_text(caption)

    def video(self, frames: np.ndarray) -> dict[str, torch.Tensor]:
        if self.loaded_video is None:
            self.loaded_text = None
            gc.collect()
            self.loaded_video = VideoEncoder(self.base, self.device, with_std=self.with_std)
        return self.loaded_video(frames)
