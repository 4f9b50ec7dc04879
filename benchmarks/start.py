"""From a process's start to its first batch, with full caches: 10,000 clips against 100. `python -m benchmarks.start`

Processor time of a fresh process and its decoder: imports, the walk over the folder, the table of samples, what is
missing in the caches (nothing), the order of batches, and the first of them. Also what a first epoch costs with
nothing cached against one from the caches, and how often encoders are called then. Encoders are stand-ins that cost
nothing.
"""

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.reporting import report
from data.batches import ExpertBatches, TrainingData
from data.cache import Cache
from data.config import DataConfig, SourceConfig
from data.filling import Filling
from data.inspection import Inspector
from data.samples import SampleTable
from data.survey import take_survey
from wan_finetune.video import write_video

SIZES = (100, 10_000)
BUCKET = "64x64x17"


def make_clips(folder: Path, count: int) -> None:
    """Clips of other bytes each, made from a few by a box that players pass over."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    originals = []
    for _ in range(8):
        picture = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        write_video(folder / "original.mp4", np.stack([np.roll(picture, k, 1) for k in range(24)]), 16)
        originals.append((folder / "original.mp4").read_bytes())
    (folder / "original.mp4").unlink()
    for number in range(count):
        box = struct.pack(">I4sQ", 16, b"free", number)
        (folder / f"{number:05d}.mp4").write_bytes(originals[number % len(originals)] + box)
        (folder / f"{number:05d}.txt").write_text(f"a moving patchwork, number {number}")


def prepare(folder: Path, encode_calls: list[int]) -> TrainingData:
    """What training does before its first step."""
    config = DataConfig(sources=[SourceConfig(path=folder / "clips")], buckets=[BUCKET], cache=folder / "cache")

    def encode_video(frames: np.ndarray) -> dict[str, torch.Tensor]:
        encode_calls[0] += 1
        return {"latent": torch.zeros(16, 5, 8, 8)}

    def encode_text(caption: str) -> torch.Tensor:
        encode_calls[0] += 1
        return torch.zeros(8, 64)

    with Inspector(config.cache, 60.0) as inspector:
        survey = take_survey(config, inspector, folder / "data_report.jsonl", "vae")
        samples, cache = SampleTable(survey.samples), Cache(config.cache)
        Filling(
            samples=samples,
            cache=cache,
            inspector=inspector,
            fps=config.fps,
            video_fingerprint="vae",
            text_fingerprint="text",
            encode_video=encode_video,
            encode_text=encode_text,
            progress=lambda stage, done, total: None,
        ).run()
    return TrainingData(samples, cache, config, text_fingerprint="text")


def cpu_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def first_batch(folder: Path) -> None:
    """Print what a process has cost up to its first batch, and what an epoch costs from there."""
    imported = cpu_seconds()
    calls = [0]
    data = prepare(folder, calls)
    batches = ExpertBatches(data, "high", 0, {BUCKET: 4})
    data.load(batches.places(0))
    started = cpu_seconds()
    for step in range(len(batches.schedule)):
        data.load(batches.places(step))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([imported, started, cpu_seconds(), calls[0], peak]))


def measure(folder: Path) -> dict[str, float]:
    """Two fresh processes: one with empty caches, one with full ones."""

    def run() -> list[float]:
        command = [sys.executable, "-m", "benchmarks.start", "--folder", str(folder)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    empty, full = run(), run()
    return {
        "start": full[1],
        "start_without_imports": full[1] - full[0],
        "peak_mib": full[4],
        "first_epoch_over_cached": (empty[2] - empty[0]) / (full[2] - full[1]),
        "encoder_calls_cached": full[3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="clips that are there already: only start, and print the cost")
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, help="numbers of clips that are compared")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        first_batch(arguments.folder)
        return
    found = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_clips(folder / "clips", size)
            found[size] = measure(folder)
            shutil.rmtree(folder / "cache")
    small, large = (found[size] for size in arguments.sizes)
    report(
        "start",
        {
            "sizes": arguments.sizes,
            "start_ratio": large["start"] / small["start"],
            "seconds": found,
            "peak_mib_growth": large["peak_mib"] - small["peak_mib"],
        },
        ("torch", "pyarrow"),
    )


if __name__ == "__main__":
    main()
