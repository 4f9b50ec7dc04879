"""The figures of a run: metrics.jsonl always, and a tracker if one is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from wan_finetune.experts import ExpertName

from .config import Config
from .records import JsonLines, StepRecord


class Metrics:
    """One JSON line an optimizer step, in `metrics.jsonl`; and the tracker's copy."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.file = JsonLines(config.run_folder / "metrics.jsonl")
        self.accelerator = accelerator
        self.tracked = config.tracking.tracker != "none"
        if self.tracked:
            log_folder(config).mkdir(parents=True, exist_ok=True)
            accelerator.init_trackers(config.tracking.project, init_kwargs=tracker_arguments(config))
            if accelerator.is_main_process:
                for tracker in accelerator.trackers:
                    forget_person(tracker)

    def forget_after(self, steps: Mapping[ExpertName, int]) -> None:
        """Drop lines of steps beyond these: a resumed run writes them again."""
        if self.accelerator.is_main_process:
            self.file.forget_after(steps)

    def add(self, record: StepRecord) -> None:
        """Write one step; the expert is part of every name a tracker sees."""
        if self.accelerator.is_main_process:
            self.file.append(asdict(record))
        self.track(record.expert, record.step, {k: v for k, v in asdict(record).items() if k not in ("expert", "step")})

    def track(self, expert: ExpertName, step: int, values: Mapping[str, float]) -> None:
        """Tell the tracker."""
        if self.tracked:
            self.accelerator.log(
                {**{f"{expert}/{key}": value for key, value in values.items()}, f"{expert}/step": step}
            )

    def show_clips(self, files: Sequence[Path]) -> None:
        """Give clips to wandb or trackio, which play them; as files, because arrays would bring other packages in."""
        for tracker in self.accelerator.trackers if self.tracked else ():
            if tracker.name == "wandb":
                import wandb

                tracker.log({f"samples/{file.stem}": wandb.Video(str(file), format="mp4") for file in files})
            elif tracker.name == "trackio":
                import trackio

                tracker.log({f"samples/{file.stem}": trackio.Video(str(file)) for file in files})

    def curve(self, expert: ExpertName) -> tuple[list[int], list[float]]:
        """Steps and losses of one expert."""
        mine = [line for line in self.file.lines() if line["expert"] == expert]
        return [line["step"] for line in mine], [line["loss"] for line in mine]


def tracker_arguments(config: Config) -> dict[str, dict[str, Any]]:
    """What each tracker is started with; wandb would send the program's path, its arguments and the machine's name, and
    trackio store what the machine does otherwise."""
    if config.tracking.tracker == "trackio":
        return {"trackio": {"name": config.run.name, "resume": "allow", "auto_log_gpu": False, "auto_log_cpu": False}}
    if config.tracking.tracker != "wandb":
        return {}
    import wandb

    silent = wandb.Settings(
        disable_git=True, disable_code=True, x_disable_meta=True, x_disable_machine_info=True, console="off"
    )
    return {"wandb": {"name": config.run.name, "dir": str(log_folder(config)), "settings": silent}}


def forget_person(tracker: GeneralTracker) -> None:
    """Take the Hub's name of whoever is logged in out of what trackio stores with its first figures."""
    if tracker.name == "trackio":
        tracker.run.config["_Username"] = None


def log_folder(config: Config) -> Path:
    """Where a tracker keeps its own files."""
    return config.run_folder / "tracker"
