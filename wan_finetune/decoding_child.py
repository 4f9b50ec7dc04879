"""The decoding process: answers its parent's questions about files until the parent goes. See `decoding`.

A message is its length in 4 bytes, then a JSON object; with the length may come a descriptor.
"""

import ctypes
import errno
import json
import math
import mmap
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

MAX_MESSAGE_BYTES = 2**28

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def send(connection: socket.socket, message: dict[str, Any], descriptor: int | None = None) -> None:
    """Send a message, and a copy of the descriptor. Raises ConnectionError or TimeoutError."""
    data = json.dumps(message).encode("ascii")
    length = len(data).to_bytes(4, "big")
    if descriptor is None:
        connection.sendall(length)
    else:
        socket.send_fds(connection, [length], [descriptor])
    connection.sendall(data)


def receive(connection: socket.socket, timeout_seconds: float | None) -> tuple[dict[str, Any], list[int]]:
    """The next message, with its descriptors, which are the caller's to close.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: the message was not complete in time.
        ValueError: it is none.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    descriptors: list[int] = []
    length = int.from_bytes(_receive_bytes(connection, 4, deadline, descriptors), "big")
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    message = json.loads(_receive_bytes(connection, length, deadline, descriptors))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message, descriptors


def _receive_bytes(
    connection: socket.socket, num_bytes: int, deadline: float | None, descriptors: list[int]
) -> bytearray:
    data = bytearray()
    while len(data) < num_bytes:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        connection.settimeout(remaining)
        part, new, _, _ = socket.recv_fds(connection, min(num_bytes - len(data), 2**20), 1)
        descriptors += new
        if not part:
            raise EOFError
        data += part
    return data


def main(memory_bytes: int, parent: int) -> None:
    """Serve the socket that is standard input, within limits, until its other end is closed."""
    connection = socket.socket(fileno=os.dup(0))
    # Signals go to the parent, which decides; this process ends when it is told to, and with its parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    import decord  # noqa: F401  so that the first question does not wait for it

    from . import video  # noqa: F401

    # What decoders print tells whether they met damage; nobody else is to read it.
    noise = os.memfd_create("noise", os.MFD_CLOEXEC)
    os.dup2(noise, 2)
    os.close(noise)
    send(connection, {})
    with suppress(EOFError, ConnectionError):
        while True:
            question, descriptors = receive(connection, None)
            try:
                answer = _answer(question, descriptors, memory_bytes)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            send(connection, answer)


def _answer(question: dict[str, Any], descriptors: list[int], memory_bytes: int) -> dict[str, Any]:
    from .video import VideoFault, probe

    try:
        if question["do"] == "inspect":
            return {"info": probe(Path(question["path"])).to_record()}
        _decode(question, descriptors[0])
    except VideoFault as fault:
        return {"fault": fault.reason, "lasting": fault.lasting}
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            reason = f"needs more than {memory_bytes / 2**30:g} GiB of memory to decode; scale it down"
            return {"fault": reason, "lasting": False}
        return {"fault": f"its decoder failed on it ({type(error).__name__}); export it again", "lasting": True}
    return {}


def _decode(question: dict[str, Any], descriptor: int) -> None:
    import numpy as np

    from .video import VideoInfo, read_frames

    info = VideoInfo.from_record(Path(question["path"]), question["info"])
    indices = np.array(question["indices"], dtype=np.int64)
    shape = (len(indices), info.height, info.width, 3)
    # All pages at once: one by one, as they are written, would cost several per cent of the decoding.
    memory = mmap.mmap(descriptor, math.prod(shape), mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    frames = np.frombuffer(memory, np.uint8).reshape(shape)
    _take_noise()
    read_frames(info, indices, out=frames)
    if info.reader == "decord" and _take_noise():
        # decord conceals damage; PyAV marks the frames that have some, and they are refused.
        read_frames(replace(info, reader="pyav"), indices, out=frames)


def _take_noise() -> bool:
    """Whether anything was printed on standard error since the last call."""
    num_bytes = os.lseek(2, 0, os.SEEK_END)
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return num_bytes > 0


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
