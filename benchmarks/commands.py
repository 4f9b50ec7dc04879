"""How soon the commands of the data room answer. `python -m benchmarks.commands`

`--help`, and a check of one small clip, each as a fresh process: its wall-clock time, the least of several runs (what
else the machine does can only add to it); its processor time, without and with that of the decoding process, which
works beside it; and which of the heavy packages were imported. The clip has been looked at once before.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.reporting import report
from wan_finetune.video import write_video

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "scipy", "pandas")
TARGETS = {"help_seconds": 0.3, "check_seconds": 0.7}

PROBE = """
import runpy, sys, time
sys.argv = ["data.check", *sys.argv[1:]]
try:
    runpy.run_module("data.check", run_name="__main__")
finally:
    print("imported:", time.process_time(), *sorted(set(sys.modules) & {heavy!r}), file=sys.stderr)
"""


def write_set(folder: Path) -> Path:
    """A folder with one clip of 64x64x24 and its configuration."""
    (folder / "clips").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    write_video(folder / "clips" / "a.mp4", np.stack([np.roll(picture, k, 1) for k in range(24)]), 16)
    (folder / "clips" / "a.txt").write_text("a patchwork that moves to the right")
    config = folder / "config.toml"
    config.write_text(
        f"[model]\nbase = 'pocket'\n[data]\ntrigger = 'acme'\nbuckets = ['64x64x17']\ncache = '{folder / 'cache'}'\n"
        f"[[data.sources]]\npath = '{folder / 'clips'}'\n"
    )
    return config


def timed(command: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a process and its children."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    cpu, began = used(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began, used() - cpu


def looked_into(arguments: list[str]) -> tuple[float, list[str]]:
    """Processor seconds of a command itself, and which of the heavy packages it imports."""
    program = PROBE.format(heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    line = next(line for line in done.stderr.splitlines() if line.startswith("imported:"))
    return float(line.split()[1]), line.split()[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, object] = {"targets": TARGETS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check = ["--config", str(write_set(folder)), "--out", str(folder / "out")]
        for what, arguments in (("help", ["--help"]), ("check", check)):
            seconds = [timed([sys.executable, "-m", "data.check", *arguments]) for _ in range(runs)]
            walls, cpus = zip(*seconds, strict=True)
            figures[f"{what}_seconds"] = round(min(walls), 3)
            figures[f"{what}_seconds_median"] = round(float(np.median(walls)), 3)
            own = [looked_into(arguments) for _ in range(3)]
            figures[f"{what}_cpu_seconds"] = round(min(cpu for cpu, _ in own), 3)
            figures[f"{what}_cpu_seconds_with_decoder"] = round(min(cpus), 3)
            figures[f"{what}_imports"] = own[0][1]
    report("commands", figures, ("pydantic", "av", "decord", "numpy"))


if __name__ == "__main__":
    main()
