"""Memory that a decoding process writes frames into and its parent reads them from, without a copy."""

import fcntl
import math
import mmap
import os
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray


class Segment:
    """Anonymous memory of at least `num_bytes`, mapped here; pages are taken when they are first written."""

    def __init__(self, num_bytes: int) -> None:
        self.owner = os.getpid()
        # A power of two, so that clips of about one size find the segment of the one before large enough.
        self.num_bytes = 1 << (max(num_bytes, 1) - 1).bit_length()
        self.descriptor = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.num_bytes)
        # Nobody who has the descriptor can shorten the memory under a reader, which would kill the reader.
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.memory = mmap.mmap(self.descriptor, self.num_bytes)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class SegmentPool:
    """Keeps one segment that nobody uses any more for the next clip: fresh pages cost up to a tenth of its decoding."""

    def __init__(self) -> None:
        self._idle: deque[Segment] = deque(maxlen=1)

    def take(self, num_bytes: int) -> Segment:
        """A segment that nobody else uses."""
        try:
            segment = self._idle.pop()
        except IndexError:
            return Segment(num_bytes)
        # After a fork the other process may still use it.
        if segment.owner == os.getpid() and segment.num_bytes >= num_bytes:
            return segment
        return Segment(num_bytes)

    def array(self, segment: Segment, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The start of a segment as an array; when that and all views of it are gone the segment comes back here."""
        whole = np.frombuffer(segment.memory, np.uint8, math.prod(shape))
        weakref.finalize(whole, _put_back, self._idle, segment).atexit = False
        return whole.reshape(shape)

    def clear(self) -> None:
        """Forget the idle segment."""
        self._idle.clear()


def _put_back(idle: deque[Segment], segment: Segment) -> None:
    if segment.owner == os.getpid():
        idle.append(segment)
