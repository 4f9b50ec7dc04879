"""Batches made ahead of their use, in the order of their steps."""

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """`make(step)` for one step after another, `ahead` of the step that is taken, in one background thread.

    What a step's batch holds is `make`'s matter alone, so the order stays addressed and nothing needs saving: taking
    another step than the next one begins anew from there. One thread suffices: reading and checksums let others run.
    `make` must not depend on what the taking thread changes meanwhile. Use it in a `with` block, or `close` it.
    """

    def __init__(self, make: Callable[[int], Made], ahead: int = 2) -> None:
        self._make, self._ahead = make, ahead
        self._work: _Work[Made] | None = None
        self._next = 0

    def __enter__(self) -> "Prefetcher[Made]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, step: int) -> Made:
        """What `make` made of a step; raises what it raised."""
        if self._work is None or step != self._next:
            self.close()
            self._work = _Work(self._make, step, self._ahead)
        self._next = step + 1
        made, error = self._work.results.get()
        if error is not None:
            self.close()
            raise error
        assert made is not None
        return made

    def close(self) -> None:
        """Let the thread end, and forget what was made ahead."""
        if self._work is not None:
            self._work.stop()
            self._work = None


class _Work(Generic[Made]):
    """One thread and its results."""

    def __init__(self, make: Callable[[int], Made], first: int, ahead: int) -> None:
        self.results: queue.Queue[tuple[Made | None, BaseException | None]] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        # A daemon: a process that is ending does not wait for a slow disk.
        self._thread = threading.Thread(target=self._run, args=(make, first), name="prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self, make: Callable[[int], Made], first: int) -> None:
        for step in itertools.count(first):
            try:
                made, error = make(step), None
            except BaseException as raised:  # whatever it is, the thread that takes the step must see it
                made, error = None, raised
            while not self._stopped.is_set():
                try:
                    self.results.put((made, error), timeout=0.05)
                    break
                except queue.Full:
                    continue
            if error is not None or self._stopped.is_set():
                return
