"""SIGTERM, SIGINT and SIGUSR1 end a run at once, or after the step that is under way, with its state on disk."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """The run was asked to end, and nothing that it had is lost.

    Like KeyboardInterrupt no `Exception`, so that no library takes it for a failure of its own and goes on.
    """

    exit_code = 128 + signal.SIGTERM
    """One status for every signal, so that a scheduler has one thing to look for."""


class StopRequest:
    """What a signal does: it raises `Stopped` where it arrives; while deferred, it waits to be asked for.

    A second signal ends the process as if nothing were installed.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.waits = False
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.waits:
            raise Stopped(signal.Signals(number).name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep a signal waiting: what runs in here asks for it by `check`; at the end it is raised."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.signal_number:
            raise Stopped(signal.Signals(self.signal_number).name)

    def check(self, accelerator: "Accelerator") -> int:
        """The signal that any process got, or 0; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.signal_number
        import torch

        mine = torch.tensor([self.signal_number], device=accelerator.device)
        return int(accelerator.gather(mine).max())
