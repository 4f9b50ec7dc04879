"""SIGTERM, SIGINT and SIGUSR1 end a run at once, or after the step that is under way, with its state on disk."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from .ranks import say_stopped

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STATUSES = "WAN_FINETUNE_STATUSES"
"""Environment variable with a file into which each process writes how it ended; `launch.sh` gives it."""


def report_status(status: int) -> None:
    """Tell the launcher how this process ends: accelerate's and torchrun's own status is 1 whatever their ranks say."""
    if name := os.environ.get(STATUSES):
        # A launcher that cannot be told does with its own status.
        with contextlib.suppress(OSError), open(name, "a") as file:
            file.write(f"{status}\n")


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

    def insist(self, patience_seconds: float = 10.0) -> None:
        """From now on a signal also ends a process that cannot hear it.

        Python runs handlers between two of its instructions. Outside of training a process may wait in native code for
        another one that has already stopped (NCCL's barriers do so for ten minutes), with nothing to lose.
        """
        heard, rung = os.pipe()
        os.set_blocking(rung, False)
        signal.set_wakeup_fd(rung, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(heard, patience_seconds), name="signals", daemon=True).start()

    def _watch(self, heard: int, patience_seconds: float) -> None:
        while number := os.read(heard, 1)[0]:
            if number not in SIGNALS:
                continue
            time.sleep(patience_seconds)
            if signal.getsignal(number) == self.receive and not self.waits:
                say_stopped(signal.Signals(number).name)
                report_status(Stopped.exit_code)
                os._exit(Stopped.exit_code)

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
