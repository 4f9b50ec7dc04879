"""What a video file holds, and which reader is exact for it, found by demuxing it once."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Reader = Literal["decord", "pyav"]


class VideoFault(InputError):
    """A fault of one video file. `reason` says fault and remedy without the path, for reports that must not leak it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoInfo:
    """What demuxing says about a video file; sizes are those on display, after rotation."""

    path: Path
    width: int
    height: int
    pts_seconds: NDArray[np.float64]
    """Presentation times [F], ascending, the first is 0."""
    last_frame_seconds: float
    """How long the last frame stays on display."""
    reader: Reader
    rotation_degrees: int = 0
    """Counter-clockwise turn the container asks for: 0, 90, 180 or 270."""
    ticks: NDArray[np.int64] | None = None
    """Presentation times in the stream's own unit [F]; None where they cannot be trusted and frames are counted."""

    tick_seconds: float = 0.0
    """Unit to which the container rounds time stamps; 0 where frames are counted."""

    @property
    def tolerance_seconds(self) -> float:
        """How much later than its true time a frame may be stamped: half a tick, where a tick is a rounding unit."""
        return min(self.tick_seconds / 2, 0.0005) + 1e-6

    @property
    def num_frames(self) -> int:
        return len(self.pts_seconds)

    @property
    def duration_seconds(self) -> float:
        """From the first frame's appearance to the end of the last one's display."""
        return float(self.pts_seconds[-1]) + self.last_frame_seconds

    @property
    def fps(self) -> float:
        """Mean frame rate, snapped to a ratio such as 30000/1001 where one is within a millionth."""
        if self.num_frames > 1:
            rate = (self.num_frames - 1) / float(self.pts_seconds[-1])
        else:
            rate = 1 / self.last_frame_seconds
        near = Fraction(rate).limit_denominator(1001)
        return float(near) if math.isclose(near, rate, rel_tol=1e-6) else rate


@dataclass(slots=True)
class _Scan:
    """Findings of one pass over a stream's packets, in decoding order."""

    pts: list[int | None]
    discarded: int = 0
    corrupt: int = 0
    leading: int = 0
    last_duration: int = 0
    end_seconds: float = 0.0
    first_frame: av.VideoFrame | None = None


def probe(path: Path) -> VideoInfo:
    """Demux a file once (2-50 ms), decode its first frame, and choose its reader.

    Raises:
        VideoFault: no such file, empty, no video, cut off, no frame, or pixels that are not square.
    """
    if not path.is_file():
        raise VideoFault(path, "no such file; check the name")
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise VideoFault(path, "the file is empty (0 bytes); copy or export it again")
    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise VideoFault(path, "holds no video stream; replace or remove it")
            stream = container.streams.video[0]
            beyond = [entry for entry in stream.index_entries if entry.pos + entry.size > size_bytes]
            scan = _scan(container, stream)
            if beyond or scan.corrupt or _ends_early(container, stream, scan):
                raise VideoFault(path, "the file is cut off before its end; copy or export it again")
            return _describe(path, container, stream, scan)
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        fault = getattr(error, "strerror", None) or type(error).__name__
        raise VideoFault(
            path, f"not a readable video, or cut off ({fault}); export it again, H.264 in mp4 is safest"
        ) from None


def open_container(path: Path) -> Any:
    """A PyAV container for reading, to be closed by `with`."""
    # An absolute path cannot be taken for a URL, and a playlist in disguise cannot reach the network.
    return av.open(str(path.absolute()), options={"protocol_whitelist": "file"})


def _scan(container: Any, stream: Any) -> _Scan:
    scan = _Scan(pts=[])
    key_pts: int | None = None
    last_pts: int | None = None
    for packet in container.demux():
        if packet.stream_index != stream.index:
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                scan.end_seconds = max(scan.end_seconds, end)
            continue
        if scan.first_frame is None:
            scan.first_frame = next(iter(packet.decode()), None)
        if not packet.size:
            continue
        scan.corrupt += packet.is_corrupt
        if packet.is_discard:
            scan.discarded += 1
            continue
        scan.pts.append(packet.pts)
        if packet.pts is None:
            continue
        if packet.is_keyframe:
            key_pts = packet.pts
        elif key_pts is not None and packet.pts < key_pts:
            scan.leading += 1
        if last_pts is None or packet.pts > last_pts:
            last_pts, scan.last_duration = packet.pts, packet.duration or 0
    if last_pts is not None:
        scan.end_seconds = max(scan.end_seconds, float((last_pts + scan.last_duration) * stream.time_base))
    return scan


def _ends_early(container: Any, stream: Any, scan: _Scan) -> bool:
    """Whether Matroska's stated duration is not reached; mov and avi are judged by their index."""
    if "matroska" not in container.format.name or not scan.pts:
        return False
    frame_seconds = float(1 / (stream.average_rate or 25))
    if stated := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        expected = int(stated[1]) * 3600 + int(stated[2]) * 60 + float(stated[3])
        return bool(expected - scan.end_seconds > 0.75 * frame_seconds + 0.01)
    if container.duration is None:
        return False
    # Without the tag only the whole file's length is stated, and muxers round it generously.
    return bool(container.duration / av.time_base - scan.end_seconds > 0.5 + frame_seconds)


def _describe(path: Path, container: Any, stream: Any, scan: _Scan) -> VideoInfo:
    frame = scan.first_frame
    if frame is None or not scan.pts:
        raise VideoFault(path, "holds no frame that can be decoded; export it again")
    aspect = stream.sample_aspect_ratio
    if aspect and abs(aspect - 1) > 0.02:
        raise VideoFault(
            path, f"its pixels are not square ({aspect}); re-encode with ffmpeg -vf scale=iw*sar:ih,setsar=1"
        )
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    stamps = [pts for pts in scan.pts if pts is not None]
    # AVI stamps B-frames in decoding order; missing or repeated stamps say nothing about order either.
    trusted = container.format.name != "avi" and len(set(stamps)) == len(scan.pts)
    ticks = np.sort(np.array(stamps, dtype=np.int64)) if trusted else None
    if ticks is not None:
        pts_seconds = (ticks - ticks[0]) * float(stream.time_base)
        typical = float(np.median(np.diff(pts_seconds))) if len(ticks) > 1 else float(1 / rate)
        last_frame_seconds = float(scan.last_duration * stream.time_base) or typical
    else:
        pts_seconds = np.arange(len(scan.pts)) / float(rate)
        last_frame_seconds = float(1 / rate)
    rotation = round(frame.rotation) % 360
    width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)
    suits_decord = (
        trusted
        and ("matroska" in container.format.name or "mp4" in container.format.name)
        and not scan.leading
        and not scan.discarded
        and not rotation
        and frame.format.name in ("yuv420p", "yuvj420p")
        and stream.frames in (0, len(scan.pts))
        and _decord_count(path) == len(scan.pts)
    )
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        pts_seconds=pts_seconds,
        last_frame_seconds=last_frame_seconds,
        reader="decord" if suits_decord else "pyav",
        rotation_degrees=rotation,
        ticks=ticks,
        tick_seconds=float(stream.time_base) if ticks is not None else 0.0,
    )


def _decord_count(path: Path) -> int:
    import decord

    try:
        return len(decord.VideoReader(str(path.absolute()), num_threads=1))
    except decord.DECORDError:
        return -1
