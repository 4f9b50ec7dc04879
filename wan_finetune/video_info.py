"""What is known of a clip or a still once it has been looked at, and the plain record of it that can be kept."""

import base64
import math
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Reader = Literal["decord", "pyav", "pillow"]

RECORD_VERSION = 1
"""Goes up when the record's fields or their meaning change; a record of another version is to be made anew."""

MAX_FRAMES = 100_000_000
"""More than this in a record is damage, not footage: 19 days at 60 frames a second."""


class VideoFault(InputError):
    """A fault of one file. `reason` says fault and remedy without the path, for reports that must not leak it.

    `lasting` is whether the same bytes will have it the next time; what rights, memory or a busy machine did may pass.
    """

    def __init__(self, path: Path, reason: str, *, lasting: bool = True) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoInfo:
    """What one look at a file says; sizes are those on display: turned, and with square pixels."""

    path: Path
    width: int
    height: int
    pts_seconds: NDArray[np.float64]
    """Presentation times [F], ascending, the first is 0."""
    last_frame_seconds: float
    """How long the last frame stays on display."""
    reader: Reader
    stored_size: tuple[int, int] | None = None
    """Width and height of the pixels in the file, where frames are turned or resampled for display; else None."""
    rotation_degrees: int = 0
    """Counter-clockwise turn the container asks for: 0, 90, 180 or 270."""
    mirrored: bool = False
    """Whether left and right change places before that turn."""
    ticks: NDArray[np.int64] | None = None
    """Presentation times in the stream's own unit [F]; None where they cannot be trusted and frames are counted."""
    tick_seconds: float = 0.0
    """Unit to which the container rounds time stamps; 0 where frames are counted."""
    key_frames: NDArray[np.int64] | None = None
    """Indices, ascending, of the frames at which decoding can begin; None where frames are counted."""

    @property
    def tolerance_seconds(self) -> float:
        """How much later than its true time a frame may be stamped: half a tick, where a tick is a rounding unit."""
        return min(self.tick_seconds / 2, 0.0005) + 1e-6

    @property
    def num_frames(self) -> int:
        return len(self.pts_seconds)

    @property
    def is_still(self) -> bool:
        """Whether the file is an image and not a video of any length."""
        return self.reader == "pillow"

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

    def to_record(self) -> dict[str, Any]:
        """All but the path, as plain values for JSON: about 300 bytes, and one byte a frame where gaps vary."""
        times = self.pts_seconds.view(np.int64) if self.ticks is None else self.ticks
        return {
            "version": RECORD_VERSION,
            "width": self.width,
            "height": self.height,
            "last_frame_seconds": self.last_frame_seconds,
            "reader": self.reader,
            "stored_size": self.stored_size,
            "rotation_degrees": self.rotation_degrees,
            "mirrored": self.mirrored,
            "counted": self.ticks is None,
            "tick_seconds": self.tick_seconds,
            "times": _pack(times),
            "key_frames": None if self.key_frames is None else _pack(self.key_frames),
        }

    @classmethod
    def from_record(cls, path: Path, record: dict[str, Any]) -> "VideoInfo":
        """What `to_record` was called on, bit for bit, for the file at `path`.

        Raises:
            ValueError: a record of another version, or a damaged one.
        """
        try:
            if record["version"] != RECORD_VERSION:
                raise ValueError(f"has version {record['version']}, {RECORD_VERSION} is current")
            times = _unpack(record["times"])
            ticks = None if record["counted"] else times
            tick_seconds = float(record["tick_seconds"])
            pts_seconds = times.view(np.float64) if ticks is None else seconds_of(ticks, tick_seconds)
            info = cls(
                path=path,
                width=int(record["width"]),
                height=int(record["height"]),
                pts_seconds=pts_seconds,
                last_frame_seconds=float(record["last_frame_seconds"]),
                reader=record["reader"],
                stored_size=None if record["stored_size"] is None else _two(*record["stored_size"]),
                rotation_degrees=int(record["rotation_degrees"]),
                mirrored=bool(record["mirrored"]),
                ticks=ticks,
                tick_seconds=tick_seconds,
                key_frames=None if record["key_frames"] is None else _unpack(record["key_frames"]),
            )
            if info.reader not in ("decord", "pyav", "pillow") or info.num_frames == 0 or info.width * info.height <= 0:
                raise ValueError("holds values that no file has")
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"not a record of a video: {error}; look at the file again") from error
        return info


def checked_indices(info: VideoInfo, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frame indices [F] of a file. Raises VideoFault where there is none, or one that the file has not."""
    indices = np.asarray(indices, dtype=np.int64)
    if len(indices) == 0 or indices.min() < 0 or indices.max() >= info.num_frames:
        raise VideoFault(info.path, f"frame indices must be in 0..{info.num_frames - 1}, got {indices}")
    return indices


def seconds_of(ticks: NDArray[np.int64], tick_seconds: float) -> NDArray[np.float64]:
    """Times [F] from the first frame on."""
    return (ticks - ticks[0]) * tick_seconds


def _two(width: int, height: int) -> tuple[int, int]:
    return int(width), int(height)


def _pack(values: NDArray[np.int64]) -> str:
    # At a constant rate all differences are equal, and any number of them packs into a few bytes.
    steps = np.diff(values, prepend=np.int64(0)).astype("<i8")
    return base64.b64encode(zlib.compress(steps.tobytes())).decode("ascii")


def _unpack(text: str) -> NDArray[np.int64]:
    inflate = zlib.decompressobj()
    steps = inflate.decompress(base64.b64decode(text, validate=True), 8 * MAX_FRAMES)
    if not inflate.eof or not steps:
        raise ValueError("its times are cut off, or too many")
    return np.cumsum(np.frombuffer(steps, "<i8"), dtype=np.int64)
