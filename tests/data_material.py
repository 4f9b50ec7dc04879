"""Clips, records and stand-in encoders that the tests of the data room share."""

from pathlib import Path

import numpy as np
import torch

from data.cache import Cache
from data.config import DataConfig, SourceConfig
from data.filling import Filling
from data.inspection import Inspector
from data.samples import SampleTable
from data.survey import Survey, leave_out_unencoded, take_survey
from wan_finetune.video import VideoInfo, write_video


def add_clip(folder, name, captions="a red ball rolls", *, size=(64, 64), num_frames=40, fps=25, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[:] = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 5 + seed
    target = path.with_suffix(".mp4")
    write_video(target, frames, fps)
    target.rename(path)
    if captions is not None:
        path.with_suffix(".txt").write_text(captions, encoding="utf-8")
    return path


def config_for(*folders, cache, **changes):
    """A configuration whose sources are these folders; a source may also be a dictionary of its settings."""
    sources = [SourceConfig(**(f if isinstance(f, dict) else {"path": f})) for f in folders]
    return DataConfig(sources=sources, cache=cache, **{"buckets": ["64x64x17"], **changes})


def info_of(width=64, height=64, num_frames=40, fps=25.0):
    return VideoInfo(
        path=Path("clip.mp4"),
        width=width,
        height=height,
        pts_seconds=np.arange(num_frames) / fps,
        last_frame_seconds=1 / fps,
        reader="decord",
    )


class Encoders:
    """Stand-ins that count what they are asked."""

    def __init__(self):
        self.clips, self.texts = [], []

    def video(self, frames):
        self.clips.append(frames.tobytes())
        num_frames, height, width, _ = frames.shape
        mean = torch.from_numpy(frames.mean(axis=(1, 2, 3), dtype=np.float64)).float()[::4]
        return {"latent": mean[None, :, None, None].expand(16, (num_frames + 3) // 4, height // 8, width // 8)}

    def text(self, caption):
        self.texts.append(caption)
        return torch.full((len(caption.split()) + 1, 4), float(len(caption)))


def survey_of(config, report) -> Survey:
    """What a walk over the sources finds."""
    with Inspector(config.cache, 60.0) as inspector:
        return take_survey(config, inspector, report, "vae-1")


def prepare(config, report, encoders=None, progress=lambda stage, done, total: None, **changes) -> SampleTable:
    """Survey, fill the caches, and leave out what could not be encoded."""
    encoders = encoders or Encoders()
    encoder = changes.get("video_fingerprint", "vae-1")
    with Inspector(config.cache, 60.0) as inspector:
        survey = take_survey(config, inspector, report, encoder)
        arguments = {"video_fingerprint": "vae-1", "text_fingerprint": "umt5-1", **changes}
        Filling(
            samples=SampleTable(survey.samples),
            cache=Cache(config.cache),
            inspector=inspector,
            fps=config.fps,
            encode_video=encoders.video,
            encode_text=encoders.text,
            progress=progress,
            **arguments,
        ).run()
        return SampleTable(leave_out_unencoded(config, survey, Cache(config.cache), inspector).samples)


def good_folder(tmp_path):
    """Three good clips, one in a subfolder, with one or two captions."""
    folder = tmp_path / "clips"
    add_clip(folder, "b.mp4", "a red ball rolls\n\n一个红色的球\n", seed=1)
    add_clip(folder, "a.MOV", "\ufeffa blue square", seed=2)
    add_clip(folder, "sub/c.mkv", "a green star &amp; a moon", seed=3)
    return folder
