"""SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an end, after the step that is under way."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to end, and its state is on disk."""

    exit_code = 128 + signal.SIGTERM
    """One status for every signal, so that a scheduler has one thing to look for."""


class StopRequest:
    """Remembers that a signal came; a second one ends the process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal_number = 0
        for number in SIGNALS:
            signal.signal(number, self.remember)

    def remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> int:
        """The signal that any process got, or 0; all processes get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.signal_number
        mine = torch.tensor([self.signal_number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())
