"""What a person at a terminal sees while a run goes on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=True)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    console.print(text, highlight=False, markup=False)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator["Bar"]:
    """A bar on a terminal; elsewhere a line now and then, so that logs stay short."""
    if not sys.stdout.isatty():
        yield Bar(None, label, total)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, label, total)


class Bar:
    """Progress of one piece of work."""

    def __init__(self, progress: Progress | None, label: str, total: int) -> None:
        self.progress, self.label, self.total = progress, label, total
        self.task = progress.add_task(label, total=total, note="") if progress else None
        self.shown = 0

    def restart(self, label: str, total: int) -> None:
        """Go on with the next piece of work; a terminal has room for one live bar."""
        self.label, self.total, self.shown = label, total, 0
        if self.progress is not None and self.task is not None:
            self.progress.reset(self.task, description=label, total=total)

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` is finished."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif done == self.total or done - self.shown >= max(1, self.total // 4):
            self.shown = done
            say(f"  {self.label} {done}/{self.total}  {note}".rstrip())
