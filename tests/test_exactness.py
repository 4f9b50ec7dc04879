"""The trainer is exact: however it is stopped, killed, split or watched, it ends at the same bytes."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.child_runs import checkpoints, finish, losses, result, start, start_pair
from tests.faulty_training import WRITING, Fault, soak_child, trained_on
from tests.fork_server import ROOT, Child, fork
from tests.tiny_runs import tiny_config, write_config
from train.checkpoint import found, load_states, verify
from train.config import Config

QUIET = ["sampling.prompts=[]", "validation.every_steps=0"]
MANY_CHECKPOINTS = ["train.checkpoint_every_steps=1", *QUIET]


def updates(child: Child) -> int:
    return child.output.count("updated\n")


def told(child: Child) -> list[str]:
    """What a person is told; gloo and the count of updates speak for themselves."""
    return [line for line in child.output.splitlines() if line != "updated" and not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def whole(tiny_base, shared, tmp_path_factory) -> tuple[Config, dict[str, str], float]:
    """A run that nothing disturbed, and the seconds that it took."""
    config = tiny_config(tiny_base, shared, tmp_path_factory.mktemp("whole"), *MANY_CHECKPOINTS)
    finish(config)
    shutil.rmtree(config.run_folder)
    began = time.monotonic()
    finish(config)
    return config, result(config), time.monotonic() - began


# --- killed ----------------------------------------------------------------------------------------------------------


def resume_after_kill(config: Config, whole: tuple[Config, dict[str, str], float]) -> None:
    finish(config)
    assert result(config) == whole[1]
    assert losses(config) == losses(whole[0])
    assert len(found(checkpoints(config))) == 2 and not list(checkpoints(config).glob(".step-*"))


def kill_while_writing(make_config, whole, phase: str, occurrence: int) -> None:
    config = make_config(f"run.name='{WRITING.index(phase)}-{occurrence}'", *MANY_CHECKPOINTS)
    child = start(config, Fault(killed_while=phase, occurrence=occurrence))
    assert child.wait() == -signal.SIGKILL, child.output
    resume_after_kill(config, whole)


def kill_at_random(make_config, whole, number: int) -> None:
    config = make_config(f"run.name='random-{number}'", *MANY_CHECKPOINTS)
    child = start(config)
    time.sleep(random.Random(number).uniform(0, whole[2]))
    child.kill()
    resume_after_kill(config, whole)


@pytest.mark.parametrize("phase", WRITING)
def test_a_run_killed_while_it_writes_a_checkpoint_ends_as_if_nothing_had_been(make_config, whole, phase):
    kill_while_writing(make_config, whole, phase, 1 + WRITING.index(phase) % 3)


def test_a_run_killed_at_any_time_ends_as_if_nothing_had_been(make_config, whole):
    for number in range(3):
        kill_at_random(make_config, whole, number)


@pytest.mark.slow
def test_forty_nine_kills_are_all_made_good(make_config, whole):
    for phase, occurrence in itertools.product(WRITING, (1, 2, 3)):
        kill_while_writing(make_config, whole, phase, occurrence)
    for number in range(25):
        kill_at_random(make_config, whole, number)


# --- resumed ---------------------------------------------------------------------------------------------------------

PLACES = {"start": 1, "middle": 3, "end": 6, "after": 7}
"""Steps of 4 clips where an epoch of 24 is 6 steps."""
AUGMENTATION = [
    *["data.buckets=['64x64x5']", "data.windows='random'", "data.windows_per_clip=3", "data.shuffle_tags=true"],
    "lora.dropout=0.2",
]
CELLS = list(
    itertools.product(("window's end", "window's middle"), PLACES, (True, False), (True, False), ("0.0", "0.5"))
)


def cell_config(make: Callable[..., Config], name: str, augmented: bool, dropout: str) -> Config:
    return make(
        f"run.name='{name}'",
        *["high.steps=8", "low.steps=2", "train.gradient_accumulation=2", "train.round_steps=8", *QUIET],
        *[f"data.caption_dropout={dropout}", "train.checkpoint_every_steps=2", *(AUGMENTATION if augmented else [])],
    )


@pytest.fixture(scope="module")
def references(tiny_base, shared, tmp_path_factory) -> Callable[[bool, str], Config]:
    """Undisturbed runs, by augmentation and caption dropout; each is made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("references"), {}

    def reference(augmented: bool, dropout: str) -> Config:
        if (augmented, dropout) not in made:
            config = cell_config(
                lambda *o: tiny_config(tiny_base, shared, folder, *o), f"{augmented}-{dropout}", augmented, dropout
            )
            finish(config)
            made[augmented, dropout] = config
        return made[augmented, dropout]

    return reference


def resume_in_cell(make_config, references, window: str, place: str, prefetch: bool, augmented: bool, dropout: str):
    reference, step = references(augmented, dropout), PLACES[place]
    config = cell_config(
        make_config, f"{window}-{place}-{prefetch}-{augmented}-{dropout}".replace("'", ""), augmented, dropout
    )
    fault = Fault(stop_at=step, prefetch=prefetch)
    if window == "window's middle":
        # The second micro-batch of the next step: gradients of the first are lost with the process.
        fault = Fault(killed_at=(step, 1), prefetch=prefetch)
    child = start(config, fault)
    code = child.wait()
    assert code == (143 if window == "window's end" else -signal.SIGKILL), child.output
    steps = {name: state.step for name, state in load_states(found(checkpoints(config))[0]).items()} if step > 1 else {}
    finish(config, Fault(prefetch=prefetch))
    jobs = [c.run.folder / f"{c.run.name}-job" for c in (reference, config)]
    assert trained_on(jobs[0]) == trained_on(jobs[1])
    assert losses(reference) == losses(config)
    assert result(reference) == result(config)
    # It went on in the middle, and did not start anew.
    if steps:
        assert f"going on from high step {steps['high']}" in child.log.read_text()


@pytest.mark.parametrize(
    "cell", [CELLS[i] for i in (0, 5, 19, 30, 38, 45, 52, 63)], ids=lambda c: "-".join(map(str, c))
)
def test_a_resumed_run_sees_the_same_samples_and_ends_at_the_same_bytes(make_config, references, cell):
    resume_in_cell(make_config, references, *cell)


@pytest.mark.slow
def test_resume_is_exact_in_all_sixty_four_cells(make_config, references):
    assert len(CELLS) == 64
    for cell in CELLS:
        resume_in_cell(make_config, references, *cell)


def test_augmentation_and_caption_dropout_change_what_is_trained_on(references):
    """Or the matrix above would compare nothing."""
    seen = [
        json.dumps([[str(key), value] for key, value in trained_on(c.run.folder / f"{c.run.name}-job").items()])
        for c in (references(augmented, dropout) for augmented in (True, False) for dropout in ("0.0", "0.5"))
    ]
    assert len(set(seen)) == 4


# --- on another number of processes, in another split ----------------------------------------------------------------

ELASTIC = ["train.batch_size=2", "high.steps=6", "low.steps=2", "train.round_steps=6", *QUIET]
ALONE, PAIR = "train.gradient_accumulation=2", "train.gradient_accumulation=1"


def test_one_then_two_then_one_process_end_where_one_does(make_config):
    """Bit-identical: the two halves of a global batch are the same micro-batches, and of two the sum has one order."""
    one = make_config("run.name='one'", ALONE, *ELASTIC)
    finish(one)
    mixed = make_config("run.name='mixed'", ALONE, *ELASTIC)
    first = start(mixed, Fault(stop_at=2))
    assert first.wait() == 143
    before = len(told(first))  # in the log that the first of two goes on with
    pair = start_pair(make_config("run.name='mixed'", PAIR, *ELASTIC), Fault(stop_at=4, rank=1))
    assert [child.wait() for child in pair] == [143, 143], pair[0].output
    assert "going on from high step 2" in pair[0].output and "stopping after high step 4" in pair[0].output
    # What is true of both is said once: by the first, though the signal went to the second.
    lines = told(pair[0])[before:]
    assert told(pair[1]) == [] and len(set(lines)) == len(lines)
    assert lines[-1] == "stopped by SIGUSR1; the same command goes on from here"
    finish(mixed)
    assert losses(one) == losses(mixed)
    assert result(one) == result(mixed)


@pytest.mark.slow  # test_engines.py has two processes in the fast tier
def test_two_processes_of_torchrun_train_what_one_does(make_config):
    one = make_config("run.name='one'", ALONE, *ELASTIC)
    finish(one)
    pair = make_config("run.name='pair'", PAIR, *ELASTIC)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code = (
        "import sys; from pathlib import Path; from tests.faulty_training import *;"
        "sys.exit(train_child(Path(sys.argv[1]), Fault()))"
    )
    script = pair.run.folder / "pair.py"
    script.write_text(code)
    done = subprocess.run(
        [*command, str(script), str(write_config(pair))],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert losses(one) == losses(pair)
    assert result(one) == result(pair)


@pytest.mark.parametrize("split", [(4, 1), (1, 4)])
def test_another_split_of_the_global_batch_moves_a_loss_by_a_millionth_at_most(make_config, split):
    sizes = {"whole": (2, 2), "split": split}
    told = []
    for name, (batch, accumulation) in sizes.items():
        config = make_config(
            f"run.name='{name}'", *ELASTIC, f"train.batch_size={batch}", f"train.gradient_accumulation={accumulation}"
        )
        finish(config)
        told.append(losses(config))
    assert told[0].keys() == told[1].keys()
    differences = [abs(float.fromhex(value) - float.fromhex(told[1][key])) for key, value in told[0].items()]
    assert max(differences) <= 1e-6 and max(differences) > 0


# --- watched ---------------------------------------------------------------------------------------------------------

WATCHING = {
    "no checkpoint but at the ends": ["train.checkpoint_every_steps=100"],
    "previews with other prompts, seeds and steps": ["sampling.seeds=[1, 2]", "sampling.steps=3"],
    "held-out losses": ["validation.every_steps=1"],
    "other evaluation": ["evaluation.prompts=['A red circle moves up in a desert.']", "evaluation.seeds=[7, 8]"],
    "one expert after the other": ["train.order='sequence'"],
    "short rounds": ["train.round_steps=1"],
    "a tracker": ["tracking.tracker='wandb'"],
}


def test_nothing_that_is_watched_or_saved_moves_the_training(make_config):
    # Held-out clips are no training clips, however often they are looked at: here as well.
    plain = make_config("run.name='plain'", *MANY_CHECKPOINTS, "validation.every_steps=100")
    finish(plain)
    for number, (what, overrides) in enumerate(WATCHING.items()):
        config = make_config(f"run.name='watched-{number}'", "train.checkpoint_every_steps=3", *overrides)
        # The whole job: previews in the middle of training, evaluation and export at its end.
        finish(config, Fault(whole_job=number < 4))
        assert result(config) == result(plain), what
        assert losses(config) == losses(plain), what


# --- not finite ------------------------------------------------------------------------------------------------------

POISONS = ("latent", "text", "gradient", "loss")
POISONED = [
    *itertools.product(POISONS, ("high", "low"), (1, 2, 4), (None,)),
    # The last is which of two processes it happens to.
    *((kind, "high", step, (place + step) % 2) for place, kind in enumerate(POISONS) for step in (1, 2, 3)),
]


def poison_run(make_config, kind: str, expert: str, step: int, rank: int | None) -> None:
    config = make_config(f"run.name='{kind}-{expert}-{step}-{rank}'", *MANY_CHECKPOINTS)
    fault = Fault(poison=(kind, expert, step), rank=rank or 0)
    children = [start(config, fault)] if rank is None else start_pair(config, fault)
    codes = [child.wait() for child in children]
    assert set(codes) == {3}, children[0].output
    # Rounds of two steps, the high expert first.
    done = step - 1 + (2 if expert == "low" or step > 2 else 0) + (2 if expert == "low" and step > 2 else 0)
    for number, child in enumerate(children):
        which = f"process {number}: " if number else ""  # each has its error, and says whose it is
        assert f"\n{which}error: {expert} expert, step {step}: loss" in f"\n{child.output}"
        assert "clip-" in child.output.split("samples: ")[1].split(". Nothing was updated")[0]
        assert updates(child) == done
    held = [path for path in found(checkpoints(config)) if verify(path) is None]
    assert [path.name for path in held[:1]] == ([f"step-{done:06d}"] if done else [])


@pytest.mark.parametrize("case", [POISONED[i] for i in (0, 4, 7, 11, 18, 22)], ids=lambda c: "-".join(map(str, c)))
def test_what_is_not_finite_stops_the_run_before_the_update(make_config, case):
    poison_run(make_config, *case)


@pytest.mark.parametrize("kind", ["latent", "gradient"])
def test_what_is_not_finite_in_one_of_two_processes_stops_both(make_config, kind):
    poison_run(make_config, kind, "high", 2, 1)


@pytest.mark.slow
def test_every_poison_stops_the_run_before_the_update(make_config):
    assert len(POISONED) == 36
    for case in POISONED:
        poison_run(make_config, *case)


# --- long ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_thousand_steps_and_a_hundred_checkpoints_hold_on_to_nothing(make_config, tmp_path):
    config = make_config(
        *["train.experts=['high']", "high.steps=2000", "train.round_steps=2000", "train.checkpoint_every_steps=20"],
        *QUIET,
    )
    facts = tmp_path / "facts.jsonl"
    child = fork(
        soak_child,
        write_config(config),
        facts,
        log=tmp_path / "soak.log",
        environment={"ACCELERATE_USE_CPU": "true"},
    )
    assert child.wait(400) == 0, child.output
    resident, descriptors, threads = zip(*map(json.loads, facts.read_text().splitlines()), strict=True)
    assert len(resident) == 100
    # The first tenth fills allocators and caches that stay.
    assert max(resident[10:]) - resident[10] <= 8 << 20
    # The last checkpoint is written when the thread that reads ahead is gone.
    assert set(descriptors) == {descriptors[0]} and set(threads[:-1]) == {threads[0]} and threads[-1] <= threads[0]
