"""A million samples: what the table and the order of batches take. `python -m benchmarks.table`

The table is written and opened in processes of their own; memory is what each of them grows by: with the pages of the
mapped file that it has touched, which the system takes back when it needs them, and without (`own`). Steps are counted
in processor time, the first of an epoch (which draws its order) apart from the others.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.reporting import report
from data.batches import ExpertBatches, TrainingData
from data.buckets import Bucket
from data.cache import Cache
from data.config import DataConfig, SourceConfig
from data.framing import Box
from data.samples import Sample, SampleTable, write_samples

COUNTS = (10_000, 1_000_000)


def samples(count: int) -> Iterator[Sample]:
    """Samples of two buckets and two sources."""
    for number in range(count):
        yield Sample(
            clip=f"folder/{number:07d}.mp4",
            path=Path(f"/data/clips/folder/{number:07d}.mp4"),
            source=number % 2,
            still=False,
            bucket=Bucket(832, 480, 33 if number % 3 else 17),
            width=1280,
            height=720,
            box=Box(0.0, 0.0, 1280.0, 720.0),
            start_seconds=(0.5,),
            latent_keys=(f"{number:064x}",),
            captions=((f"a clip that shows the number {number}",),),
            mask=None,
            mask_keys=(),
        )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def own_mib() -> float:
    """Memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def written(folder: Path, count: int) -> dict[str, float]:
    """Write the table."""
    before, began = peak_mib(), time.process_time()
    file = write_samples(folder, samples(count))
    return {
        "write_mib": peak_mib() - before,
        "write_us_a_sample": 1e6 * (time.process_time() - began) / count,
        "file_bytes_a_sample": file.stat().st_size / count,
    }


def opened(folder: Path) -> dict[str, float]:
    """Open it, and draw batches."""
    before, own_before, began = peak_mib(), own_mib(), time.process_time()
    table = SampleTable(next(folder.glob("*.arrow")))
    sources = [SourceConfig(path=Path("a")), SourceConfig(path=Path("b"), weight=1.0)]
    config = DataConfig(sources=sources, buckets=["832x480x33", "832x480x17"])
    data = TrainingData(table, Cache(folder), config, text_fingerprint="text")
    batches = ExpertBatches(data, "high", 0, {"832x480x33": 4, "832x480x17": 4})
    built = time.process_time()
    batches.places(0)
    first = time.process_time()
    for step in range(1, 201):
        batches.places(step)
    return {
        "open_mib": peak_mib() - before,
        "own_mib": own_mib() - own_before,
        "open_seconds": built - began,
        "first_step_seconds": first - built,
        "later_step_ms": 1e3 * (time.process_time() - first) / 200,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=COUNTS, help="numbers of samples that are compared")
    parser.add_argument("--folder", type=Path, help="with --write or without: one measurement, in this process")
    parser.add_argument("--write", type=int, help="write so many samples")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        print(json.dumps(written(arguments.folder, arguments.write) if arguments.write else opened(arguments.folder)))
        return
    found = {}
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, "-m", "benchmarks.table", "--folder", name]
            results = [
                json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
                for line in ([*command, "--write", str(count)], command)
            ]
        found[str(count)] = {**results[0], **results[1]}
    report("table", found, ("torch", "pyarrow"))


if __name__ == "__main__":
    main()
