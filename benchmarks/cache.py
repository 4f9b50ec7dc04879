"""Files, shards or a database for the caches? `python -m benchmarks.cache`

The same entries are written, listed, read in random order, pruned by half and written by four processes at once, in
three ways: the project's cache (a safetensors file an entry, checked on reading), safetensors shards of 256 entries
behind an index of their headers, and one SQLite table. Shards and table are read without checksums, which favours them.
"""

import argparse
import multiprocessing
import os
import random
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.reporting import report
from data.cache import Cache

PER_SHARD = 256


class Store(Protocol):
    """Where entries lie."""

    def write(self, key: str, tensor: Tensor) -> None:
        """Add one."""

    def finish(self) -> None:
        """Write what is held back."""

    def keys(self) -> set[str]:
        """All that are there, as a new process finds out."""

    def read(self, key: str) -> Tensor:
        """One of them."""

    def prune(self, keep: set[str]) -> None:
        """Remove all others, and give their space back."""


class Files:
    """A file an entry."""

    def __init__(self, folder: Path) -> None:
        self.cache = Cache(folder)

    def write(self, key: str, tensor: Tensor) -> None:
        self.cache.write("latent", key, {"latent": tensor}, {"bucket": "832x480x33", "start_seconds": "0.0"})

    def finish(self) -> None:
        pass

    def keys(self) -> set[str]:
        return self.cache.keys("latent")

    def read(self, key: str) -> Tensor:
        entry = self.cache.read("latent", key)
        assert entry is not None
        return entry["latent"]

    def prune(self, keep: set[str]) -> None:
        self.cache.prune("latent", keep)


class Shards:
    """Files of `PER_SHARD` entries. What a process holds back for its next shard is lost when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.held: dict[str, Tensor] = {}
        self.where: dict[str, Any] = {}

    def write(self, key: str, tensor: Tensor) -> None:
        self.held[key] = tensor.clone()
        if len(self.held) == PER_SHARD:
            self.finish()

    def finish(self) -> None:
        if not self.held:
            return
        partial = self.folder / f".{secrets.token_hex(8)}.tmp"
        with partial.open("wb") as file:
            file.write(safetensors.torch.save(self.held))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / f"{secrets.token_hex(8)}.safetensors")
        self.held = {}

    def keys(self) -> set[str]:
        self.where = {}
        for path in self.folder.glob("*.safetensors"):
            shard = safetensors.safe_open(path, "pt")
            self.where.update(dict.fromkeys(shard.keys(), shard))
        return set(self.where)

    def read(self, key: str) -> Tensor:
        return self.where[key].get_tensor(key).clone()

    def prune(self, keep: set[str]) -> None:
        for path in list(self.folder.glob("*.safetensors")):
            for key, tensor in safetensors.torch.load_file(path).items():
                if key in keep:
                    self.write(key, tensor)
            path.unlink()
        self.finish()
        self.where = {}


class Table:
    """One SQLite table, a commit an entry."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(folder / "cache.sqlite3", timeout=60, isolation_level=None)
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, content BLOB)")

    def write(self, key: str, tensor: Tensor) -> None:
        content = safetensors.torch.save({"latent": tensor})
        self.database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, content))

    def finish(self) -> None:
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def keys(self) -> set[str]:
        return {key for (key,) in self.database.execute("SELECT key FROM entries")}

    def read(self, key: str) -> Tensor:
        row = self.database.execute("SELECT content FROM entries WHERE key = ?", (key,)).fetchone()
        return safetensors.torch.load(row[0])["latent"]

    def prune(self, keep: set[str]) -> None:
        gone = [(key,) for key in self.keys() - keep]
        self.database.execute("BEGIN")
        self.database.executemany("DELETE FROM entries WHERE key = ?", gone)
        self.database.execute("COMMIT")
        self.database.execute("VACUUM")
        self.finish()


STORES: dict[str, Callable[[Path], Store]] = {"files": Files, "shards": Shards, "sqlite": Table}


def key_of(number: int) -> str:
    return f"{(number + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128:032x}" * 2


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def write_many(name: str, folder: Path, first: int, count: int, tensor: Tensor) -> None:
    store = STORES[name](folder)
    for number in range(first, first + count):
        store.write(key_of(number), tensor)
    store.finish()


def write_from_four(name: str, folder: Path, count: int, tensor: Tensor) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_many, args=(name, folder, rank * count // 4, count // 4, tensor))
        for rank in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert all(writer.exitcode == 0 for writer in writers), "a writer failed"


def measure(name: str, folder: Path, count: int, reads: int, synced: int, tensor: Tensor) -> dict[str, float]:
    """All figures of a store of `count` entries; times of writing are of `synced` entries, brought to disk for real."""
    wall, _ = timed(lambda: write_many(name, folder / "synced", 0, synced, tensor))
    four, _ = timed(lambda: write_from_four(name, folder / "four", synced, tensor))
    # The disk's own time is measured above; here it would only make the run longer.
    with patch("os.fsync", lambda _: None):
        _, filling = timed(lambda: write_many(name, folder / "full", 0, count, tensor))
    store = STORES[name](folder / "full")
    listing_wall, listing = timed(store.keys)
    order = random.Random(0).choices(range(count), k=reads)
    _, reading = timed(lambda: [store.read(key_of(number)) for number in order])
    assert torch.equal(store.read(key_of(order[0])), tensor)
    used = sum(path.stat().st_blocks * 512 for path in (folder / "full").rglob("*") if path.is_file())
    keep = {key_of(number) for number in range(0, count, 2)}
    pruning_wall, _ = timed(lambda: store.prune(keep))
    assert STORES[name](folder / "full").keys() == keep
    return {
        "write_ms": round(wall / synced * 1e3, 3),
        "write_by_four_processes_ms": round(four / synced * 1e3, 3),
        "write_cpu_ms": round(filling / count * 1e3, 3),
        "list_all_seconds": round(listing_wall, 3),
        "list_all_cpu_seconds": round(listing, 3),
        "random_read_cpu_ms": round(reading / reads * 1e3, 3),
        "disk_bytes_per_payload_byte": round(used / (tensor.nbytes * count), 3),
        "prune_half_seconds": round(pruning_wall, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="an empty folder on the disk in question; a temporary one else")
    parser.add_argument("--count", type=int, default=100_000, help="small entries")
    parser.add_argument("--store", choices=STORES, nargs="*", default=list(STORES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small, large = torch.randn(16, 3, 8, 8).half(), torch.randn(16, 9, 60, 104)
    figures: dict[str, Any] = {}
    for name in arguments.store:
        for title, tensor, count, reads, synced in (
            (f"{arguments.count} x 16x3x8x8 fp16", small, arguments.count, 5000, 1024),
            ("200 x 16x9x60x104 fp32", large, 200, 200, 64),
        ):
            folder = Path(tempfile.mkdtemp(dir=arguments.folder))
            try:
                figures.setdefault(title, {})[name] = measure(name, folder, count, reads, synced, tensor)
            finally:
                shutil.rmtree(folder)
    report("cache", figures, ("torch", "safetensors", "xxhash"))


if __name__ == "__main__":
    main()
