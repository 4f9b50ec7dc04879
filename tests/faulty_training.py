"""The trainer in a child, with a fault built in where a test wants one, and a log of what it trained on."""

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

WRITING = (
    "a folder is made",
    "half an adapter is written",
    "half an optimizer is written",
    "all but the manifest is written",
    "nothing is forced to disk",
    "nothing is published",
    "the old one is still there",
    "half of the old one is removed",
)
"""Phases of writing a checkpoint."""

PHASES = {
    "the configuration is read": ("train.__main__", "load_settings"),
    "clips are encoded": ("data.filling", "Cache.write"),
    "an expert is loaded": ("wan_finetune.memory.residence", "load_base"),
    "a step is taken": ("train.trainer", "ExpertTrainer.backward"),
    "a checkpoint is written": ("train.checkpoint", "write_checkpoint"),
    "a preview is made": ("train.previews", "make_clips"),
    "the adapter is verified": ("train.job", "verify_adapter_folder"),
    "samples are made": ("train.showcase", "sample"),
    "the evaluation compares": ("train.showcase", "compare"),
}
"""Phases of a whole job: what is called in each."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong in a child."""

    killed_while: str = ""
    """A phase of writing a checkpoint, one of WRITING."""
    occurrence: int = 1
    """How often that phase is passed before."""
    stop_at: int | None = None
    """Step of the high expert after which SIGUSR1 comes."""
    killed_at: tuple[int, int] | None = None
    """Step and micro-batch of the high expert in whose backward pass the process dies."""
    poison: tuple[str, str, int] | None = None
    """What becomes not a number: latent, text, gradient or loss; of which expert; in which step, from 1."""
    waits_in: str = ""
    """A phase of the job, one of PHASES, in which the process waits for a signal."""
    rank: int = 0
    """The process that is meant."""
    prefetch: bool = True
    """Whether batches are made ahead of their use."""
    whole_job: bool = False
    """Whether previews, evaluation and export are made too."""


def train_child(config: Path, fault: Fault) -> int:
    """`-m train --config CONFIG` with a fault; ends after training unless the whole job is wanted."""
    from train import __main__ as command

    rank = os.environ.get("RANK", "0")
    (config.parent / f"pid-{rank}").write_text(str(os.getpid()))
    install(fault)
    if fault.waits_in and int(rank) == fault.rank:
        wait_for_a_signal(fault.waits_in, config.parent / "reached")
    log_what_is_trained_on(config.parent / "trained_on.jsonl")
    sys.argv = ["train", "--config", str(config)]
    return command.main()


def install(fault: Fault) -> None:
    """Build the fault in."""
    from train import checkpoint, job, previews, showcase

    # The disk's cache survives a process, and forcing it out takes most of a tiny run's time.
    checkpoint.sync = lambda path: None
    if not fault.whole_job:
        job.write_adapter_folder = job.write_card = lambda *_: []
        job.verify_adapter_folder = showcase.show = previews.Previews.make = lambda *_: None
    if not fault.prefetch:
        replace_prefetcher()
    if fault.killed_while:
        kill_while_writing(fault.killed_while, fault.occurrence)
    if int(os.environ.get("RANK", "0")) == fault.rank:
        if fault.stop_at is not None or fault.killed_at is not None:
            end_in_training(fault)
        if fault.poison is not None:
            poison(*fault.poison)
    count_updates()


def wait_for_a_signal(phase: str, reached: Path) -> None:
    """Say that the phase is reached, and stay there until a signal has come; where it is deferred, go on then."""
    module, name = PHASES[phase]
    owner: Any = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)

    def act(*_: Any, **__: Any) -> None:
        reached.touch()
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.01)

    before(owner, attribute, act)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived SIGKILL")


def before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Call `act` with the arguments of each call of `owner.name` before it is made."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        act(*arguments, **keywords)
        return original(*arguments, **keywords)

    setattr(owner, name, wrapped)


def before_each_part(act: Callable[..., None]) -> None:
    """Call `act(trainer, part, step, number of the part in its step)` before the loss of each part of a batch."""
    from train.trainer import ExpertTrainer

    last: dict[str, Any] = {"step": None, "part": 0}

    def counted(trainer: ExpertTrainer, part: Any, step: int, global_batch: int) -> None:
        now = (trainer.expert, step)
        last.update(step=now, part=last["part"] + 1 if now == last["step"] else 0)
        act(trainer, part, step, last["part"])

    before(ExpertTrainer, "loss_of", counted)


def kill_while_writing(phase: str, occurrence: int) -> None:
    """Die in a phase, the `occurrence`-th time that it is reached."""
    from train import checkpoint

    reached = 0

    def due(condition: bool = True) -> bool:
        nonlocal reached
        reached += condition
        return condition and reached == occurrence

    def half_written(ending: str) -> Callable[..., None]:
        def act(tensors: Any, path: Path) -> None:
            if due(path.name == ending):
                from safetensors.torch import save

                whole = save(tensors)
                path.write_bytes(whole[: len(whole) // 2])
                die()

        return act

    def when(condition: Callable[..., bool]) -> Callable[..., None]:
        return lambda *arguments, **_: die() if due(condition(*arguments)) else None

    def half_removed(path: Path, **_: Any) -> None:
        if due(path.name.endswith(".retired")):
            next(p for p in sorted(path.rglob("*")) if p.is_file()).unlink()
            die()

    hooks: dict[str, tuple[Any, str, Callable[..., None]]] = {
        WRITING[0]: (checkpoint, "save_file", when(lambda _, path: path.name == "adapter.safetensors")),
        WRITING[1]: (checkpoint, "save_file", half_written("adapter.safetensors")),
        WRITING[2]: (checkpoint, "save_file", half_written("optimizer.safetensors")),
        WRITING[3]: (checkpoint, "hash_of", when(lambda _: True)),
        WRITING[4]: (checkpoint, "sync", when(lambda path: path.name == "manifest.json")),
        WRITING[5]: (checkpoint.os, "rename", when(lambda old, _: Path(old).name.endswith(".partial"))),
        WRITING[6]: (checkpoint, "retire", when(lambda _: True)),
        WRITING[7]: (checkpoint.shutil, "rmtree", half_removed),
    }
    before(*hooks[phase])


def end_in_training(fault: Fault) -> None:
    """A signal after a step, or death in the middle of an accumulation."""
    from train.trainer import ExpertTrainer

    step = ExpertTrainer.take_step

    def take_step(self: ExpertTrainer) -> Any:
        record = step(self)
        if (self.expert, self.state.step) == ("high", fault.stop_at):
            os.kill(os.getpid(), signal.SIGUSR1)
        return record

    def act(trainer: ExpertTrainer, part: Any, step: int, index: int) -> None:
        if trainer.expert == "high" and (step, index) == fault.killed_at:
            die()

    ExpertTrainer.take_step = take_step  # type: ignore[method-assign]
    before_each_part(act)


def poison(kind: str, expert: str, step: int) -> None:
    """Put one value that is not finite where it says."""
    from accelerate import Accelerator

    from train import trainer
    from train.trainer import ExpertTrainer

    now: dict[str, Any] = {"due": False}

    def act(trainer: ExpertTrainer, part: Any, number: int, index: int) -> None:
        now["due"] = due = (trainer.expert, number + 1, index) == (expert, step, 0)
        now["parameters"] = trainer.parameters
        if due and kind == "latent":
            part.batch.latents[0, 0, 0, 0, 0] = float("nan")
        if due and kind == "text":
            part.batch.text[0] = torch.full_like(part.batch.text[0], float("inf"))

    before_each_part(act)
    if kind == "loss":
        error = trainer.flow_matching_error
        trainer.flow_matching_error = lambda *a: error(*a) * (float("inf") if now["due"] else 1.0)
    if kind == "gradient":
        backward = Accelerator.backward

        def poisoned(self: Accelerator, loss: Any, **keywords: Any) -> None:
            backward(self, loss, **keywords)
            if now["due"]:
                now["parameters"][0].grad[0, 0] = float("nan")

        Accelerator.backward = poisoned  # type: ignore[method-assign]


def replace_prefetcher() -> None:
    """Make every batch when it is used."""
    from train import trainer

    class Direct:
        def __init__(self, make: Callable[[int], Any]) -> None:
            self.take = make

        def close(self) -> None:
            pass

    trainer.Prefetcher = Direct  # type: ignore[assignment,misc]


def count_updates() -> None:
    """Say each update of weights, so that a test can count them."""
    # The fused optimizer's own step, as accelerate calls it.
    before(torch.optim.AdamW, "step", lambda *_, **__: print("updated", flush=True))


def log_what_is_trained_on(path: Path) -> None:
    """One line a micro-batch: its clips, and sums of what was read of them."""

    def act(trainer: Any, part: Any, step: int, index: int) -> None:
        batch = part.batch
        told = [float(value.double().sum()).hex() for value in [batch.latents, *batch.text]]
        with path.open("a") as file:
            file.write(json.dumps([trainer.expert, step, index, batch.names, told]) + "\n")

    before_each_part(act)


def trained_on(folder: Path) -> dict[tuple[str, int, int], Any]:
    """What was trained on by (expert, step, micro-batch); of those that were done again, the last."""
    lines = [json.loads(line) for line in (folder / "trained_on.jsonl").read_text().splitlines()]
    return {(expert, step, index): rest for expert, step, index, *rest in lines}


def soak_child(config: Path, facts: Path) -> int:
    """Train, and note at every checkpoint what the process holds."""
    from tests.process_facts import descriptors, resident_bytes
    from train import job

    save = job.save_checkpoint

    def noted(*arguments: Any) -> Any:
        saved = save(*arguments)
        mine = os.getpid()
        with facts.open("a") as file:
            file.write(json.dumps([resident_bytes(mine), descriptors(mine), threading.active_count()]) + "\n")
        return saved

    job.save_checkpoint = noted
    with contextlib.suppress(SystemExit):
        return train_child(config, Fault())
    return 1
