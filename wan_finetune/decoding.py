"""Decoding in a child process with a watchdog, so that no file can hang or kill a run.

Questions and answers are JSON (`decoding_child`), so nothing that a child sends is executed. Frames come through memory
that both map, so that a clip is held once.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decoding_child import receive, send
from .shared_frames import SegmentPool
from .video_info import VideoFault, VideoInfo, checked_indices

START_SECONDS = 120.0
"""How long a child may take to import its libraries; on a free core it takes less than half a second."""

MAX_QUESTIONS = 20_000
"""After so many a child is replaced: what its libraries lose, half a KiB with each question, does not add up."""

GIB = 2**30


class Decoder:
    """Looks at files and decodes them in one child process, started when it is first needed, replaced when it dies.

    The child does not inherit the parent's state, dies with it, and gets no signal of its terminal. A Decoder may be
    used by several threads, which wait for each other, and after a fork, where it starts a child of its own.
    """

    def __init__(self, timeout_seconds: float = 60.0, memory_bytes: int = 8 * GIB) -> None:
        """A file may keep the child busy for `timeout_seconds`, and the child may map `memory_bytes`."""
        if timeout_seconds <= 0 or memory_bytes < GIB:
            raise ValueError(f"needs some seconds and at least 1 GiB, got {timeout_seconds} s and {memory_bytes} bytes")
        self.timeout_seconds = timeout_seconds
        self.memory_bytes = memory_bytes
        self._child: _Child | None = None
        self._begun: _Child | None = None
        self._segments = SegmentPool()
        self._lock = threading.Lock()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Start the child and do not wait for it: it imports its libraries while the caller does something else."""
        with self._lock:
            if self._child is None and self._begun is None:
                self._begun = _Child(self.memory_bytes)

    def close(self) -> None:
        """End the child. A later call starts another one; frames that were read stay."""
        self._segments.clear()
        self._stop()

    def _stop(self) -> None:
        children, self._child, self._begun = (self._child, self._begun), None, None
        for child in children:
            if child is not None:
                child.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None where there is none."""
        return None if self._child is None else self._child.process.pid

    def inspect(self, path: Path) -> VideoInfo:
        """What `video.probe` says of a file.

        Raises:
            VideoFault: as `video.probe`, and where the file crashes its decoder, takes too long or too much memory.
        """
        reply = self._ask(path, {"do": "inspect"})
        try:
            return VideoInfo.from_record(path, reply["info"])
        except (KeyError, ValueError) as error:
            raise VideoFault(path, "its decoder gave a damaged answer; export it again") from error

    def read(self, info: VideoInfo, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames [F, H, W, 3], as `video.read_frames` gives them; they keep two descriptors open while they live.

        Where decord's codecs report damage, which they otherwise conceal, PyAV decides whether the frames are whole.

        Raises:
            VideoFault: as `video.read_frames`, and where the file crashes its decoder, takes too long or too much
                memory.
        """
        indices = checked_indices(info, indices)
        shape = (len(indices), info.height, info.width, 3)
        num_bytes = math.prod(shape)
        if num_bytes > self.memory_bytes:
            raise VideoFault(
                info.path,
                f"{len(indices)} frames of {info.width}x{info.height} are {num_bytes / GIB:.1f} GiB, and "
                f"{self.memory_bytes / GIB:g} GiB are the limit; scale it down",
                lasting=False,
            )
        segment = self._segments.take(num_bytes)
        question = {"do": "read", "info": info.to_record(), "indices": indices.tolist()}
        self._ask(info.path, question, segment.descriptor)
        return self._segments.array(segment, shape)

    def _ask(self, path: Path, message: dict[str, Any], descriptor: int | None = None) -> dict[str, Any]:
        message = {**message, "path": str(path.absolute())}
        with self._lock:
            reply = self._exchange(path, message, descriptor)
        if "fault" in reply:
            raise VideoFault(path, str(reply["fault"]), lasting=bool(reply.get("lasting", True)))
        return reply

    def _exchange(self, path: Path, message: dict[str, Any], descriptor: int | None) -> dict[str, Any]:
        for attempt in (1, 2):
            try:
                if self._child is None or not self._child.is_fit():
                    self._child = self._start()
                return self._child.ask(message, descriptor, self.timeout_seconds)
            except TimeoutError:
                self._stop()
                raise VideoFault(
                    path,
                    f"kept the decoder busy for more than {self.timeout_seconds:g} s; export it again, in shorter "
                    "pieces, or allow more time (decode_timeout_seconds)",
                    lasting=False,
                ) from None
            except (EOFError, ConnectionError, ValueError):
                assert self._child is not None
                cause = self._child.stop()
                self._child = None
                if cause != "SIGKILL":
                    raise VideoFault(path, f"its decoder crashed on it ({cause}); export it again") from None
                # Not the file's doing: the system was out of memory, or somebody killed the child. Once more.
                if attempt == 2:
                    raise VideoFault(
                        path,
                        "its decoder was killed twice, most likely for want of memory; scale it down",
                        lasting=False,
                    ) from None
            except BaseException:
                # A reply that nobody waits for any more would be taken for that to the next question.
                self._stop()
                raise
        raise AssertionError

    def _start(self) -> "_Child":
        begun = self._begun
        if begun is None or not begun.is_fit():
            self._stop()
            begun = self._begun = _Child(self.memory_bytes)
        begun.wait_until_ready()
        self._begun = None
        return begun


class _Child:
    """One decoding process and the socket to it."""

    def __init__(self, memory_bytes: int) -> None:
        self.owner = os.getpid()
        self.num_questions = 0
        self.socket, theirs = socket.socketpair()
        root = Path(__file__).resolve().parent.parent
        search_path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search_path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # With several arenas glibc keeps ever more free pieces of freed frames.
            "MALLOC_ARENA_MAX": "1",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wan_finetune.decoding_child", str(memory_bytes), str(self.owner)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                process_group=0,
            )
        self._end = weakref.finalize(self, _end, self.process, self.socket, self.owner)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError where it does not start."""
        try:
            receive(self.socket, START_SECONDS)
        except (EOFError, ConnectionError, TimeoutError) as error:
            assert self.process.stderr is not None
            os.set_blocking(self.process.stderr.fileno(), False)
            said = (self.process.stderr.read() or b"").decode(errors="replace").strip().splitlines()
            self.stop()
            raise RuntimeError(f"the decoding process does not start: {said[-1] if said else repr(error)}") from error
        except BaseException:
            self.stop()
            raise
        assert self.process.stderr is not None
        self.process.stderr.close()

    def is_fit(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None and self.num_questions < MAX_QUESTIONS

    def ask(self, message: dict[str, Any], descriptor: int | None, timeout_seconds: float) -> dict[str, Any]:
        self.num_questions += 1
        self.socket.settimeout(timeout_seconds)
        send(self.socket, message, descriptor)
        return receive(self.socket, timeout_seconds)[0]

    def stop(self) -> str:
        """End it, and say what it died of before: the name of a signal, or an exit status."""
        with suppress(subprocess.TimeoutExpired):
            # Where the socket closed by itself the child is dying, and its own end is what counts.
            self.process.wait(0.5 if self.owner == os.getpid() and _is_closed(self.socket) else 0)
        code = self.process.returncode
        self._end()
        if code is None:
            return "no answer"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> None:
    connection.close()
    if process.stderr is not None:
        process.stderr.close()
    if os.getpid() != owner:
        process.returncode = 0  # a fork's copy: the child belongs to the other process
        return
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)


def _is_closed(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
