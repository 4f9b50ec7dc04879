"""Conversions that end in the middle, in a child process: at a named point, or at a number of bytes."""

import ctypes
import os
import resource
import signal
from pathlib import Path

from wan_finetune.convert import job, journal, writing
from wan_finetune.convert.job import convert
from wan_finetune.convert.planning import ConvertSettings

SHARD_BYTES = 25_000
M_MMAP_THRESHOLD = -3


def settings_for(checkpoint: Path, out: Path) -> ConvertSettings:
    return ConvertSettings(checkpoint=checkpoint, out=out, max_shard_bytes=SHARD_BYTES)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_until(checkpoint: Path, out: Path, point: str, number: int) -> int:
    """Convert, and be killed at the given occurrence of a point."""
    count = 0

    def counted(function, after=False):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == number and not after:
                die()
            result = function(*arguments, **options)
            if count == number:
                die()
            return result

        return wrapped

    if point == "bytes":
        writing.HashingStream.write = counted(writing.HashingStream.write)  # type: ignore[method-assign]
    elif point == "before rename":
        writing.os.replace = counted(os.replace)
    elif point == "after rename":
        writing.os.replace = counted(os.replace, after=True)
    elif point == "verification":
        job.verify_all = counted(job.verify_all)
    elif point == "before publishing":
        job.publish = counted(job.publish)
    elif point == "after publishing":
        journal.os.rename = counted(os.rename, after=True)
    convert(settings_for(checkpoint, out))
    return 0


def convert_on_a_small_disk(checkpoint: Path, out: Path, limit_bytes: int) -> int:
    """Convert where no file can be larger than the limit: writing beyond it fails as on a full disk."""
    from wan_finetune.cli import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    return main(["convert", str(checkpoint), str(out), "--max-shard-size", str(SHARD_BYTES)])


def peak_over(tiny: Path, checkpoint: Path, out: Path, shard_bytes: int, report: Path) -> int:
    """Convert, and write down by how many bytes the resident memory rose at most, in KiB of /proc."""
    # The allocator keeps up to 64 MB of what was freed: much beside these shards, nothing beside those of 5 GB.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 << 10)
    # What is imported and set up once is no cost of a conversion.
    convert(ConvertSettings(checkpoint=tiny, out=out.with_name("tiny")))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    convert(ConvertSettings(checkpoint=checkpoint, out=out, max_shard_bytes=shard_bytes))
    report.write_text(str((status("VmHWM") - before) * 1024))
    return 0


def status(field: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
