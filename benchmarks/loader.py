"""What reading batches from the caches costs, and how long training waits for it. `python -m benchmarks.loader`

The ratio is processor time against a bare loader: safetensors' `load_file`, which checks nothing, and `torch.stack`.
Both run in interleaved pairs over the same batches, all in the disk cache, and each is also paired with itself, which
shows what a ratio of 1.0 looks like here. The stall is the share of 50 ms steps that is spent waiting for a batch.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.reporting import report
from data.cache import Cache
from data.prefetching import Prefetcher

SHAPE = (16, 9, 60, 104)
"""Latent of 832x480x33."""
TEXT = (40, 4096)
"""A caption of 40 tokens."""
ENTRIES = 64
STEP_SECONDS = 0.05

Load = Callable[[int], tuple[Tensor, list[Tensor]]]


def key_of(number: int) -> str:
    return f"{(number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128:032x}" * 2


def keys_of(step: int, batch_size: int) -> list[str]:
    return [key_of((step * batch_size + place) * 29 % ENTRIES) for place in range(batch_size)]


def fill(cache: Cache) -> None:
    for number in range(ENTRIES):
        cache.write("latent", key_of(number), {"latent": torch.randn(SHAPE)}, {"bucket": "832x480x33"})
        cache.write("text", key_of(number), {"text": torch.randn(TEXT).bfloat16()}, {"caption": "a red ball"})


def bare_loader(cache: Cache, batch_size: int) -> Load:
    """The least that can be written."""

    def load(step: int) -> tuple[Tensor, list[Tensor]]:
        keys = keys_of(step, batch_size)
        latents = [safetensors.torch.load_file(cache.path("latent", key))["latent"] for key in keys]
        # Cloned, as they are only mapped until somebody looks at them.
        text = [safetensors.torch.load_file(cache.path("text", key))["text"].clone() for key in keys]
        return torch.stack(latents), text

    return load


def cached_loader(cache: Cache, batch_size: int) -> Load:
    """Straight into the batch, checked."""

    def load(step: int) -> tuple[Tensor, list[Tensor]]:
        keys = keys_of(step, batch_size)
        latents = torch.empty(batch_size, *SHAPE)
        assert all(cache.read_into("latent", key, latents[place]) for place, key in enumerate(keys))
        text = [cache.read("text", key) for key in keys]
        return latents, [rows["text"] for rows in text if rows is not None]

    return load


def stacking_loader(cache: Cache, batch_size: int) -> Load:
    """Each entry by itself, checked, and then stacked: a copy more."""

    def load(step: int) -> tuple[Tensor, list[Tensor]]:
        keys = keys_of(step, batch_size)
        entries = [(cache.read("latent", key), cache.read("text", key)) for key in keys]
        latents = torch.stack([latent["latent"] for latent, _ in entries if latent is not None])
        return latents, [rows["text"] for _, rows in entries if rows is not None]

    return load


def processor_seconds(load: Load, steps: range) -> float:
    load(steps[0])  # the memory that the loader before gave back is of other sizes, and costs the first to ask for it
    begun = time.process_time()
    for step in steps:
        load(step)
    return time.process_time() - begun


def ratio(ours: Load, bare: Load, pairs: int, steps: int) -> dict[str, float]:
    """Medians of ours / bare and of bare / bare over interleaved pairs, and the spread of the latter."""
    ratios, control = [], []
    for pair in range(pairs + 1):
        part = range(pair * steps, (pair + 1) * steps)
        seconds = [processor_seconds(load, part) for load in (bare, ours, bare)]
        if pair:  # the first brings everything into the disk cache
            ratios.append(2 * seconds[1] / (seconds[0] + seconds[2]))
            control.append(seconds[2] / seconds[0])
    return {
        "ratio": round(statistics.median(ratios), 3),
        "control": round(statistics.median(control), 3),
        "control_sd": round(statistics.stdev(control), 3),
    }


def stall(take: Callable[[int], Any], steps: int) -> float:
    """Share of the time that is spent waiting for batches while a device works 50 ms on each."""
    waited, begun = 0.0, time.perf_counter()
    for step in range(steps):
        asked = time.perf_counter()
        take(step)
        waited += time.perf_counter() - asked
        time.sleep(STEP_SECONDS)  # the processor is idle while a GPU computes
    return round(waited / (time.perf_counter() - begun), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a folder on the disk in question; a temporary one else")
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"latent": "16x9x60x104 fp32", "text": "40x4096 bf16", "entries": ENTRIES}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        cache = Cache(Path(name))
        fill(cache)
        for batch_size in (1, 4):
            bare, ours = bare_loader(cache, batch_size), cached_loader(cache, batch_size)
            assert torch.equal(bare(3)[0], ours(3)[0])
            steps = 16 // batch_size
            figures[f"cached_over_bare_batch_{batch_size}"] = ratio(ours, bare, arguments.pairs, steps)
            stacked = ratio(stacking_loader(cache, batch_size), bare, arguments.pairs, steps)
            figures[f"read_then_stack_over_bare_batch_{batch_size}"] = stacked["ratio"]
            figures[f"stall_without_prefetching_batch_{batch_size}"] = stall(ours, 100)
            with Prefetcher(ours) as ahead:
                figures[f"stall_batch_{batch_size}"] = stall(ahead.take, 100)
    report("loader", figures, ("torch", "safetensors", "xxhash"))


if __name__ == "__main__":
    main()
