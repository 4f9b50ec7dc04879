"""What a person at a terminal sees while a run goes on. Of several processes the first one speaks for all."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from .ranks import speaks

console = Console(soft_wrap=True)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    if speaks():
        console.print(text, highlight=False, markup=False)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator["Bar"]:
    """A bar on a terminal; elsewhere a line now and then, so that logs stay short."""
    if not (sys.stdout.isatty() and speaks()):
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
    with Panel(*columns, console=console) as progress:
        yield Bar(progress, label, total)


class Panel(Progress):
    """A bar with a line of details below it."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.details:
            yield Text(f"  {self.details}", style="dim", overflow="ellipsis", no_wrap=True)


class Bar:
    """Progress of one piece of work."""

    def __init__(self, progress: Panel | None, label: str, total: int) -> None:
        self.progress, self.label, self.total = progress, label, total
        self.task = progress.add_task(label, total=total, note="") if progress else None
        self.shown = 0

    def restart(self, label: str, total: int) -> None:
        """Go on with the next piece of work; a terminal has room for one live bar."""
        self.label, self.total, self.shown = label, total, 0
        if self.progress is not None and self.task is not None:
            self.progress.reset(self.task, description=label, total=total)

    def update(self, done: int, note: str = "", details: str = "") -> None:
        """Say that `done` of `total` is finished; `details` are for a terminal alone."""
        if self.progress is not None and self.task is not None:
            self.progress.details = details
            self.progress.update(self.task, completed=done, note=note)
        elif done == self.total or done - self.shown >= max(1, self.total // 4):
            self.shown = done
            say(f"  {self.label} {done}/{self.total}  {note}".rstrip())
