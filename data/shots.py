"""Where footage is cut: PySceneDetect's content detector on frames that our own reader gives."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from wan_finetune.video import VideoInfo, read_frames

Read = Callable[[VideoInfo, NDArray[np.int64]], NDArray[np.uint8]]
"""Frames [F, H, W, 3] for indices [F]; raises VideoFault."""

THRESHOLD = 27.0
"""Mean change of hue, saturation and brightness from one frame to the next that is a cut: the library's default."""
LUMA_THRESHOLD = 6.0
"""Least mean change of brightness at a cut. Dark grain changes hue as a cut does, but brightness by 4.5 at most."""
LONGEST_SIDE = 256
"""Pixels; frames are reduced to this, as the library does. It is faster, and noise averages out."""
SHORTEST_SECONDS = 0.5
"""A shorter piece is no shot: a flash, the frames between two cuts that a fast pan was taken for."""
CHUNK_BYTES = 512 * 2**20
"""Frames held at once."""


def find_shots(info: VideoInfo, read: Read = read_frames) -> list[tuple[float, float]]:
    """Start and end of each shot in seconds, ascending; at least one, the whole clip where nothing is cut.

    A shot ends where the next frame, of another shot, begins. Pieces shorter than half a second are left out, so that
    shots need not follow on each other; where there is nothing else, the longest piece is the one shot.

    Raises:
        VideoFault: as `read`.
    """
    cuts = find_cuts(frame for part in chunks(info) for frame in read(info, part))
    edges = [0.0, *(float(info.pts_seconds[index]) for index in cuts), info.duration_seconds]
    pieces = list(itertools.pairwise(edges))
    shots = [(start, end) for start, end in pieces if end - start >= SHORTEST_SECONDS]
    return shots or [max(pieces, key=lambda piece: piece[1] - piece[0])]


def find_cuts(frames: Iterator[NDArray[np.uint8]]) -> list[int]:
    """Numbers of the frames [H, W, 3], RGB, that begin a shot, the first one excepted."""
    import cv2
    from scenedetect import ContentDetector, FrameTimecode

    # Their own minimum length counts from the start too and would pass over a cut in the first half second. They need a
    # rate for that length alone, so any will do.
    detectors = (
        ContentDetector(threshold=THRESHOLD, min_scene_len=0),
        ContentDetector(threshold=LUMA_THRESHOLD, min_scene_len=0, luma_only=True),
    )
    cuts = []
    for index, frame in enumerate(frames):
        scale = min(1.0, LONGEST_SIDE / max(frame.shape[:2]))
        size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
        pixels = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
        time = FrameTimecode(index, fps=25.0)
        if all([detector.process_frame(time, pixels) for detector in detectors]):  # both have to see every frame
            cuts.append(index)
    return cuts


def chunks(info: VideoInfo) -> Iterator[NDArray[np.int64]]:
    """All of a clip's frame numbers in order, in pieces that fit into memory.

    Each read begins to decode at a key frame, so a piece ends before one where it can: no frame is decoded twice.
    """
    most = max(1, CHUNK_BYTES // (info.height * info.width * 3))
    keys = np.empty(0, np.int64) if info.key_frames is None else info.key_frames
    start = 0
    while start < info.num_frames:
        end = min(start + most, info.num_frames)
        inside = keys[(keys > start) & (keys <= end)]
        if end < info.num_frames and len(inside):
            end = int(inside[-1])
        yield np.arange(start, end)
        start = end
