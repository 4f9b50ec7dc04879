"""Children at once: a server imports what is heavy one time and forks a process for each call.

A child is a process of its own that can be killed, signalled and limited, and has nothing of the tests' process in it.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["train.job", "diffusers.pipelines.wan.pipeline_wan", "peft", "peft.utils", "tests.faulty_training"]
started: dict[str, int] = {}


@dataclass
class Child:
    """One forked process, whose output goes to a file."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout_seconds: float = 120) -> int:
        """Its exit code; minus the signal's number where one ended it."""
        self.process.join(timeout_seconds)
        if self.process.exitcode is None:
            self.kill()
            pytest.fail(f"still running after {timeout_seconds} s:\n{self.output}")
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, to all that it has started as well."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


def fork(target: Callable[..., Any], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Call a module's function in a new child; what it returns is the exit code."""
    context = multiprocessing.get_context("forkserver")
    if started.get("by") != os.getpid():
        # A process has one server, and another test may have started it with other imports.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        started["by"] = os.getpid()
    context.set_forkserver_preload(PRELOADED)
    # The server starts with the first child, and finds the rooms by this.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        process = context.Process(target=begin, args=(target, arguments, log, dict(environment or {})))
        process.start()
    return Child(process, log)


def begin(target: Callable[..., Any], arguments: tuple[Any, ...], log: Path, environment: Mapping[str, str]) -> None:
    """In the child: become a group of its own, write to the log, and be judged by the exit code."""
    os.setsid()
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    # What the server has imported is garbage to nobody: a collection need not look at it.
    gc.freeze()
    sys.exit(target(*arguments))


def wait_for(holds: Callable[[], Any], what: str, timeout_seconds: float = 60) -> None:
    """Until something holds."""
    end = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < end, f"no {what} within {timeout_seconds} s"
        time.sleep(0.01)
