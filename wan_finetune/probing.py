"""What a file holds, and which reader is exact for it, found by demuxing it once."""

import re
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from .opening import MAX_PIXELS, check_limits, check_regular, is_playlist, open_container
from .stills import STILL_SUFFIXES, probe_still
from .video_info import Reader, VideoFault, VideoInfo, seconds_of

__all__ = ["Reader", "VideoFault", "VideoInfo", "probe"]

MAX_SECONDS = 24 * 3600
"""Longest clip. Damaged time stamps reach thousands of years."""

RGB_MATRICES = (0, 1, 2, 3, 4, 5, 6, 7)
"""Colour matrices (ITU-T H.273) that FFmpeg's conversion to RGB knows: RGB, BT.709, none stated, and BT.601's kin."""

BT2020 = 9
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


@dataclass(slots=True)
class _Scan:
    """Findings of one pass over a stream's packets, in decoding order."""

    pts: list[int | None]
    key_pts: list[int]
    discarded: int = 0
    corrupt: int = 0
    leading: int = 0
    last_duration: int = 0
    end_seconds: float = 0.0
    first_frame: av.VideoFrame | None = None


def probe(path: Path) -> VideoInfo:
    """Demux a video once (2-50 ms), decode its first frame, and choose its reader; or decode a still.

    Raises:
        VideoFault: no such file, empty, no video, cut off, no frame, too large, or colours that RGB cannot show.
    """
    size_bytes = check_regular(path)
    if path.suffix.lower() in STILL_SUFFIXES:
        return probe_still(path)
    try:
        with open_container(path) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoFault(path, "holds no video stream; replace or remove it")
            check_limits(path, stream.codec_context)
            beyond = [entry for entry in stream.index_entries if entry.pos + entry.size > size_bytes]
            scan = _scan(container, stream)
            if beyond or scan.corrupt or _ends_early(container, stream, scan):
                raise VideoFault(path, "the file is cut off before its end; copy or export it again")
            return _describe(path, container, stream, scan)
    except (VideoFault, MemoryError):
        raise
    except Exception as error:
        if is_playlist(path):
            raise VideoFault(path, "is a list of other files, not a video; put the clip itself in its place") from None
        fault = getattr(error, "strerror", None) or type(error).__name__
        raise VideoFault(
            path, f"not a readable video, or cut off ({fault}); export it again, H.264 in mp4 is safest"
        ) from error


def _scan(container: Any, stream: Any) -> _Scan:
    scan = _Scan(pts=[], key_pts=[])
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
            scan.key_pts.append(packet.pts)
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
    _check_colours(path, frame)
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    stamps = [pts for pts in scan.pts if pts is not None]
    # AVI stamps B-frames in decoding order; missing or repeated stamps say nothing about order either.
    trusted = container.format.name != "avi" and len(set(stamps)) == len(scan.pts)
    ticks = np.sort(np.array(stamps, dtype=np.int64)) if trusted else None
    if ticks is not None:
        pts_seconds = seconds_of(ticks, float(stream.time_base))
        typical = float(np.median(np.diff(pts_seconds))) if len(ticks) > 1 else float(1 / rate)
        last_frame_seconds = float(max(scan.last_duration, 0) * stream.time_base) or typical
    else:
        pts_seconds = np.arange(len(scan.pts)) / float(rate)
        last_frame_seconds = float(1 / rate)
    if not 0 < pts_seconds[-1] + last_frame_seconds <= MAX_SECONDS:
        raise VideoFault(path, "its time stamps make no sense or pass 24 hours; export it again, in parts if need be")
    rotation, mirrored = _turn(frame)
    stored = (frame.width, frame.height)
    shown = (_square_width(path, frame, stream.sample_aspect_ratio), frame.height)
    width, height = shown[::-1] if rotation % 180 else shown
    suits_decord = (
        trusted
        and ("matroska" in container.format.name or "mp4" in container.format.name)
        and len(container.streams.video) == 1
        and not scan.leading
        and not scan.discarded
        and not (rotation or mirrored)
        and shown == stored
        # Its last row has the colours of another where the height is odd.
        and not frame.height % 2
        and frame.format.name in ("yuv420p", "yuvj420p")
        and stream.frames in (0, len(scan.pts))
        and _decord_agrees(path, len(scan.pts), frame)
    )
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        pts_seconds=pts_seconds,
        last_frame_seconds=last_frame_seconds,
        reader="decord" if suits_decord else "pyav",
        stored_size=stored if (width, height) != stored else None,
        rotation_degrees=rotation,
        mirrored=mirrored,
        ticks=ticks,
        tick_seconds=float(stream.time_base) if ticks is not None else 0.0,
        key_frames=np.searchsorted(ticks, np.unique(scan.key_pts)) if ticks is not None else None,
    )


def _check_colours(path: Path, frame: av.VideoFrame) -> None:
    """Where no matrix is stated it is BT.601, and no range means limited, as in FFmpeg, decord and PyAV."""
    if transfer := HDR_TRANSFERS.get(frame.color_trc):
        raise VideoFault(
            path,
            f"is HDR ({transfer}); convert it with ffmpeg -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,"
            "tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p",
        )
    if frame.colorspace in (BT2020, BT2020 + 1) or frame.color_primaries == BT2020:
        raise VideoFault(
            path,
            "has the wide colours of BT.2020; convert it with ffmpeg -vf "
            "zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p",
        )
    if frame.colorspace not in RGB_MATRICES:
        raise VideoFault(path, f"its colour matrix (number {frame.colorspace}) is not read here; export it as BT.709")


def _turn(frame: av.VideoFrame) -> tuple[int, bool]:
    """Counter-clockwise turn, 0, 90, 180 or 270, and whether the picture is mirrored before it."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know some other side data of this frame
        return round(frame.rotation / 90) * 90 % 360, False
    if matrix is None:
        return 0, False
    # A pixel goes from (x, y) to (a x + c y, b x + d y), and y points down.
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    mirrored = a * d < b * c
    right, down = (-a, -b) if mirrored else (a, b)
    if abs(right) > abs(down):
        return (0 if right > 0 else 180), mirrored
    return (270 if down > 0 else 90), mirrored


def _square_width(path: Path, frame: av.VideoFrame, aspect: Fraction | None) -> int:
    """Width of a stored frame once its pixels are square; the height stays."""
    width = round(frame.width * aspect) if aspect else frame.width
    # Encoders that scale to a round size state ratios such as 404:405: resampling for those costs more than it mends.
    if abs(width - frame.width) <= 0.005 * frame.width:
        return frame.width
    if not frame.width / 8 <= width <= frame.width * 8 or width * frame.height > MAX_PIXELS:
        raise VideoFault(path, f"states pixels of {aspect}, which no camera has; re-encode with ffmpeg -vf setsar=1")
    return width


def _decord_agrees(path: Path, num_frames: int, first: av.VideoFrame) -> bool:
    """Whether decord, whose codecs are older, opens the file, counts as many frames, and shows the same first one."""
    import decord

    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        if len(reader) != num_frames:
            return False
        seen = reader[0].asnumpy()
    except decord.DECORDError:
        return False
    expected = first.to_ndarray(format="rgb24")
    return seen.shape == expected.shape and bool(np.abs(seen.astype(np.int16) - expected).mean() <= 0.5)
