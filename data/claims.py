"""Who is making what: claims that processes on one disk hold against each other, and that die with their holder.

A claim is a record lock (fcntl) on one byte of one file; which byte, the name's hash says. So there is nothing to clean
up: the kernel frees the locks of a process however it ends, and any number of claims shares the one file. Record locks
belong to a process, not to a descriptor: children that it forks hold none of them. Its threads count as one.
"""

import errno
import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What disks answer that know no record locks."""


class Claims:
    """The claims of this process on one file; `shared` gives it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._depth: dict[int, int] = {}

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold `name` until the end of the block: False, at once, where another process holds it.

        A process that holds it already gets it again. On a disk without record locks everybody gets everything: work
        may then be done twice, and nothing worse happens.
        """
        # 62 bits: the offset must stay positive, and two names never meet in practice.
        byte = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 2
        if not self._depth.get(byte) and not self._lock(byte):
            yield False
            return
        self._depth[byte] = self._depth.get(byte, 0) + 1
        try:
            yield True
        finally:
            self._depth[byte] -= 1
            if not self._depth[byte]:
                del self._depth[byte]
                self._unlock(byte)

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in UNSUPPORTED:
                raise
        return True

    def _unlock(self, byte: int) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def shared(path: Path) -> Claims:
    """This process's claims on a file, which is made where it is missing. Raises OSError where it cannot be."""
    # Closing any descriptor of a file drops all of the process's locks on it: there is one, and it stays open.
    return _of_process(os.path.abspath(path), os.getpid())


@functools.cache
def _of_process(path: str, process_id: int) -> Claims:
    return Claims(Path(path))
