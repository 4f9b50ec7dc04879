"""What a run tells: metrics.jsonl always, progress bars on a terminal, and a tracker if one is asked for."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from wan_finetune.experts import ExpertName

from .config import Config
from .trainer import StepRecord

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


class Metrics:
    """One JSON line an optimizer step, in `metrics.jsonl`; and the tracker's copy."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.path = config.run_folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.tracked = config.tracking.tracker != "none"
        if self.tracked:
            log_folder(config).mkdir(parents=True, exist_ok=True)
            arguments = {"wandb": {"name": config.run.name, "dir": str(log_folder(config))}}
            accelerator.init_trackers(config.tracking.project, init_kwargs=arguments)

    def forget_after(self, steps: dict[ExpertName, int]) -> None:
        """Drop lines of steps beyond these: a resumed run writes them again."""
        if self.accelerator.is_main_process and self.path.is_file():
            kept = [line for line in self.lines() if line["step"] <= steps.get(line["expert"], 0)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.path)

    def lines(self) -> list[dict]:
        """All whole lines; the last may be cut when a run was killed."""
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def add(self, record: StepRecord) -> None:
        """Write one step; the expert is part of every name a tracker sees."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        if self.tracked:
            values = {k: v for k, v in asdict(record).items() if k not in ("expert", "step")}
            named = {f"{record.expert}/{key}": value for key, value in values.items()}
            self.accelerator.log({**named, f"{record.expert}/step": record.step})

    def curve(self, expert: ExpertName) -> tuple[list[int], list[float]]:
        """Steps and losses of one expert."""
        mine = [line for line in self.lines() if line["expert"] == expert]
        return [line["step"] for line in mine], [line["loss"] for line in mine]


def log_folder(config: Config) -> Path:
    """Where a tracker keeps its own files."""
    return config.run_folder / "tracker"
