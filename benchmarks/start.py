"""From a process's start to its first batch, with full caches: 10,000 clips against 100. `python -m benchmarks.start`

Processor time of a fresh process and its decoder: imports, the walk over the folder, the table of samples, what is
missing in the caches (nothing), the order of batches, and the first of them. What an earlier run would have left is put
into the index and the caches without decoding 10,000 clips; that nothing is encoded shows that it is what was due.
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.filled import StandIns, fill_caches
from benchmarks.reporting import report
from data.batches import ExpertBatches, TrainingData
from data.cache import Cache, text_key
from data.config import DataConfig, SourceConfig
from data.inspection import Inspector, file_sha256
from data.samples import SampleTable
from data.survey import take_survey
from wan_finetune.video import write_video

SIZES = (100, 10_000)
BUCKET, LATENT = "64x64x17", (16, 5, 8, 8)
ORIGINALS = 8
"""Clips that are encoded; the others are copies of them."""


def make_clips(folder: Path, count: int) -> None:
    """Clips of other bytes each, made from a few by a box that players pass over."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    originals = []
    for _ in range(ORIGINALS):
        picture = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        write_video(folder / "original.mp4", np.stack([np.roll(picture, k, 1) for k in range(24)]), 16)
        originals.append((folder / "original.mp4").read_bytes())
    (folder / "original.mp4").unlink()
    for number in range(count):
        box = struct.pack(">I4sQ", 16, b"free", number)
        (folder / f"{number:05d}.mp4").write_bytes(originals[number % len(originals)] + box)
        (folder / f"{number:05d}.txt").write_text(f"a moving patchwork, number {number}")


def config_of(folder: Path) -> DataConfig:
    return DataConfig(sources=[SourceConfig(path=folder / "clips")], buckets=[BUCKET], cache=folder / "cache")


def fill(folder: Path) -> None:
    """What an earlier run leaves behind: facts about every file, latents and captions."""
    config, records = config_of(folder), {}
    cache = Cache(config.cache)
    with Inspector(config.cache, 60.0) as inspector:
        for number, path in enumerate(sorted((folder / "clips").glob("*.mp4"))):
            os.utime(path, (1.7e9, 1.7e9))  # what changed a moment ago is not remembered
            if number < ORIGINALS:
                records[number] = inspector.decoder.inspect(path).to_record()
            inspector.index.get(path)
            assert inspector.index.put(path, file_sha256(path), {"info": records[number % ORIGINALS]})
        survey = take_survey(config, inspector, folder / "data_report.jsonl", "vae")
    latent, text = {"latent": torch.zeros(LATENT)}, {"text": torch.zeros(8, 64)}
    cache.write("text", text_key("", "text"), text, {})
    for sample in SampleTable(survey.samples):
        for key in sample.latent_keys:
            cache.write("latent", key, latent, {})
        for orders in sample.captions:
            cache.write("text", text_key(orders[0], "text"), text, {})


def prepare(folder: Path, encoders: StandIns) -> TrainingData:
    """What training does before its first step."""
    config = config_of(folder)
    with Inspector(config.cache, 60.0) as inspector:
        samples, cache = fill_caches(config, inspector, folder / "data_report.jsonl", encoders)
    return TrainingData(samples, cache, config, text_fingerprint="text")


def cpu_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def first_batch(folder: Path) -> None:
    """Print what a process has cost up to its first batch, and how often it has encoded anything."""
    imported = cpu_seconds()
    encoders = StandIns(LATENT, torch.zeros(8, 64))
    data = prepare(folder, encoders)
    batches = ExpertBatches(data, "high", 0, {BUCKET: 4})
    data.load(batches.places(0))
    started = cpu_seconds()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([imported, started, encoders.calls, peak]))


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Fresh processes with full caches; the least of several, as chance only adds."""
    fill(folder)

    def run() -> list[float]:
        command = [sys.executable, "-m", "benchmarks.start", "--folder", str(folder)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    runs = [run() for _ in range(repeats)]
    return {
        "start": round(min(run[1] for run in runs), 3),
        "start_without_imports": round(min(run[1] - run[0] for run in runs), 3),
        "peak_mib": round(max(run[3] for run in runs), 1),
        "encoder_calls": max(run[2] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="clips that are there already: only start, and print the cost")
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, help="numbers of clips that are compared")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        first_batch(arguments.folder)
        return
    found = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_clips(folder / "clips", size)
            found[size] = measure(folder, arguments.repeats)
    small, large = (found[size] for size in arguments.sizes)
    report(
        "start",
        {
            "sizes": arguments.sizes,
            "target": 5.0,
            "start_ratio": round(large["start"] / small["start"], 2),
            "seconds": found,
            "peak_mib_growth": large["peak_mib"] - small["peak_mib"],
        },
        ("torch", "pyarrow"),
    )


if __name__ == "__main__":
    main()
