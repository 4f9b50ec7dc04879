"""Pushing to the Hub beside the training: in a process of its own, which can neither stop, fail nor delay the run."""

import atexit
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from wan_finetune.adapters import Adapter
from wan_finetune.card import make_card
from wan_finetune.errors import InputError
from wan_finetune.experts import ExpertName
from wan_finetune.export import write_adapter_folder
from wan_finetune.hub import require_login
from wan_finetune.hub_files import read_artefacts

from .best import load_best
from .terminal import say

if TYPE_CHECKING:
    from .config import Config
    from .rounds import Stretch
    from .state import ExpertState
    from .validation import HeldOutLoss, Validation

Make = Callable[["Config", ExpertName, "ExpertState"], Adapter]


class Publisher:
    """Pushes what `[hub]` asks for, and writes the card beside the adapter.

    One push is under way at a time: on the way a newer one waits for none and is left out while an older one lasts; the
    last one ends those before.
    """

    def __init__(self, config: "Config", make: Make, is_main: bool) -> None:
        self.config, self.settings, self.make = config, config.hub, make
        self.asked = is_main and self.settings.push != "none"
        self.folder = config.run_folder / "hub"
        self.child: subprocess.Popen[bytes] | None = None
        self.lowest: dict[ExpertName, float] = {}
        """Held-out losses of what was pushed."""
        self.place: tuple[int, ExpertName | None] | None = None
        """The round, and in a sequence the expert, that is under way."""

    def __enter__(self) -> "Publisher":
        """Say at the start, not after hours, that there is no login."""
        if self.asked:
            # Whatever ends the run after training: a push has a session of its own and would go on.
            atexit.register(self.end_child)
            try:
                require_login()
            except InputError as error:
                say(f"the Hub: {error}. The run goes on, and will try")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.end_child()

    def before_stretch(self, stretch: "Stretch", states: Mapping[ExpertName, "ExpertState"]) -> None:
        """Push the adapters as they stand, when a round is over and the next one begins."""
        if not self.asked or self.settings.push != "rounds":
            return
        place = (stretch.round, stretch.expert if self.config.train.order == "sequence" else None)
        before, self.place = self.place, place
        if before not in (None, place):
            self.push_midway(lambda: self.adapters(states), "Adapters as they stand")

    def at_checkpoint(self, states: Mapping[ExpertName, "ExpertState"], validation: "Validation") -> None:
        """Push each expert's best state, when a held-out loss has a new minimum."""
        if not self.asked or self.settings.push != "best":
            return
        best = {name: min(done, key=lambda each: each.loss) for name in states if (done := measured(validation, name))}
        new = [name for name, found in best.items() if found.loss < self.lowest.get(name, float("inf"))]
        if not new:
            return

        def adapters() -> list[Adapter]:
            chosen = dict(states)
            for name, found in best.items():
                if found.step != states[name].step:
                    weights = load_best(self.config.run_folder / "checkpoints", name, found.step)
                    chosen[name] = replace(states[name], step=found.step, weights=weights, average={})
            return self.adapters(chosen)

        if self.push_midway(adapters, f"Lowest held-out loss so far: {' and '.join(new)}"):
            self.lowest |= {name: best[name].loss for name in new}

    def adapters(self, states: Mapping[ExpertName, "ExpertState"]) -> list[Adapter]:
        return [self.make(self.config, name, state) for name, state in states.items() if state.weights]

    def push_midway(self, adapters: Callable[[], list[Adapter]], message: str) -> bool:
        """Start pushing adapters; False where an older push is still under way, and this one is left out."""
        if self.child is not None and self.child.poll() is None:
            say(f"the Hub: left out ({message}), the push before it is still under way")
            return False
        try:
            self.report()
            shutil.rmtree(self.folder, ignore_errors=True)
            found = adapters()
            write_adapter_folder(self.folder, found)
            steps = ", ".join(f"{adapter.expert} step {adapter.about['steps']}" for adapter in found)
            self.start(self.folder, f"{message} ({steps})")
        except Exception as error:
            # Whatever it is: an upload on the way must not cost the run.
            say(f"the Hub: nothing was pushed ({type(error).__name__}: {error}); training goes on")
        return True

    def start(self, folder: Path, message: str) -> None:
        """Push a folder in a process that signals to the run do not reach."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "wan_finetune.cli", *self.arguments(folder), "--message", message],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        """What the last push said."""
        return self.config.run_folder / "hub.log"

    def arguments(self, folder: Path) -> list[str]:
        """Of `wan-finetune`."""
        settings = self.settings
        options = ["--lang", settings.language, "--license", settings.license]
        options += ["--public"] if not settings.private else []
        options += ["--base", settings.base] if settings.base else []
        return ["push", str(folder), settings.repo, *options]

    def finish(self) -> None:
        """Push the whole run, wait for it as long as `wait_seconds` says, and say what came of it."""
        if not self.asked:
            return
        if self.child is not None and self.child.poll() is None:
            say("the Hub: the push on the way is ended, the finished run goes instead")
        self.end_child()
        command = shlex.join(["wan-finetune", *self.arguments(self.config.run_folder)])
        say(f"pushing to {self.settings.repo}, for {self.settings.wait_seconds:g} s at the most")
        began = time.monotonic()
        try:
            self.start(self.config.run_folder, "Adapter, card and samples")
            assert self.child is not None
            self.child.wait(self.settings.wait_seconds)
            if not self.report():
                say(f"the run is whole. By hand: {command}")
        except subprocess.TimeoutExpired:
            waited = f"{time.monotonic() - began:.0f} s"
            say(f"the Hub: not done after {waited} and ended; the run is whole. By hand: {command}")
        except OSError as error:
            # Of the start, or of the log of a push that may have gone well.
            say(f"the Hub: what came of the push is not known ({error}); the run is whole. By hand: {command}")
        finally:
            self.end_child()
        shutil.rmtree(self.folder, ignore_errors=True)

    def report(self) -> bool:
        """Say how the last push ended, where one has; whether it went well."""
        if self.child is None or self.child.poll() is None:
            return True
        went_well = self.child.returncode == 0
        self.child = None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.startswith("error: ") or "://" in line]
        last = (told or lines or ["it said nothing"])[-1].removeprefix("error: ")
        say(f"the Hub: {last}" if went_well else f"the Hub: nothing was pushed: {last}")
        return went_well

    def end_child(self) -> None:
        """Let no push outlive the run."""
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.child = None


def measured(validation: "Validation", name: ExpertName) -> "list[HeldOutLoss]":
    """An expert's validations after its first step."""
    return [each for each in validation.of(name) if each.step]


def write_card(config: "Config") -> Path:
    """The card beside the adapter, with the samples and figures that there are."""
    folder = config.run_folder
    artefacts = read_artefacts(folder, config.sampling)
    clips = {
        path: f"../{path.relative_to(folder).as_posix()}"
        for clip in artefacts.clips
        for path in (clip.adapter, clip.base)
        if path is not None
    }
    base = config.hub.base or config.model.public_name
    card = make_card(artefacts, base=base, language=config.hub.language, license=config.hub.license, clips=clips)
    path = folder / "adapter" / "README.md"
    partial = path.with_name(".README.md.partial")
    partial.write_text(card, encoding="utf-8")
    partial.replace(path)
    return path
