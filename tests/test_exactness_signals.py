"""SIGTERM, SIGINT and SIGUSR1, to the launcher or to a process, in every phase: 143, nothing lost, nobody left."""

import ctypes
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.child_runs import checkpoints, finish, result, start
from tests.faulty_training import PHASES, Fault
from tests.fork_server import ROOT, fork, wait_for
from tests.process_facts import is_running
from tests.test_launch import Checkout, checkout, write_script  # noqa: F401 a fixture
from tests.tiny_runs import tiny_config, write_config
from train.checkpoint import found, verify
from train.config import Config
from train.signals import SIGNALS, STATUSES, Stopped, StopRequest

JOB = [
    "train.gradient_accumulation=2",
    "high.steps=2",
    "low.steps=2",
    "train.round_steps=1",
    "validation.every_steps=0",
]
IN_TRAINING = ("a step is taken", "a checkpoint is written")
"""Phases in which a signal waits for the end of the step, and a checkpoint is made."""


@pytest.fixture(scope="module")
def undisturbed(tiny_base, shared, tmp_path_factory) -> dict[str, str]:
    """The files of both experts where no signal came."""
    config = tiny_config(tiny_base, shared, tmp_path_factory.mktemp("undisturbed"), *JOB)
    finish(config)
    return result(config)


def make_job(make_config, name: str, phase: str, *overrides: str) -> Config:
    settings = [f"run.name='{name}'", *JOB, *overrides]
    config = make_config(*settings)
    own = {
        "clips are encoded": f"data.cache='{config.run.folder / name}-cache'",
        "samples are made": "sampling.prompts=[]",  # or the preview's samples come first
    }
    return make_config(*settings, own[phase]) if phase in own else config


def check_what_is_left(config: Config, phase: str, undisturbed: dict[str, str], output: str) -> None:
    """A checkpoint of the step that was under way, or of all before; and the same command goes on to the same bytes."""
    held = [path.name for path in found(checkpoints(config)) if verify(path) is None]
    if phase in IN_TRAINING:
        assert held[0] == "step-000001"
        assert ("stopping after high step 1, which is saved" in output) == (phase == "a step is taken")
    elif phase in list(PHASES)[5:]:
        assert held[0] == ("step-000002" if phase == "a preview is made" else "step-000004")
    one_process = config.model_copy(
        update={"train": config.train.model_copy(update={"gradient_accumulation": 2}), "sampling": config.sampling}
    )
    finish(one_process)
    assert result(config) == undisturbed


def signal_in_phase(make_config, undisturbed, phase: str, number: signal.Signals) -> None:
    config = make_job(make_config, f"{number.name}-{list(PHASES).index(phase)}", phase)
    child = start(config, Fault(waits_in=phase, whole_job=True))
    wait_for((config.run.folder / f"{config.run.name}-job" / "reached").exists, phase, 120)
    os.kill(child.pid, number)
    sent = time.monotonic()
    assert child.wait(15) == 143, child.output
    assert time.monotonic() - sent < 15
    assert f"stopped by {number.name}; the same command goes on from here" in child.output
    assert "Traceback" not in child.output
    check_what_is_left(config, phase, undisturbed, child.output)


@pytest.mark.parametrize(("phase", "number"), [*zip(PHASES, SIGNALS * 3, strict=True)], ids=str)
def test_a_signal_in_any_phase_ends_with_143_and_loses_nothing(make_config, undisturbed, phase, number):
    signal_in_phase(make_config, undisturbed, phase, number)


@pytest.mark.slow
def test_each_signal_in_each_phase_ends_with_143_and_loses_nothing(make_config, undisturbed):
    for phase, number in itertools.product(PHASES, SIGNALS):
        signal_in_phase(make_config, undisturbed, phase, number)


# --- through launch.sh, accelerate's launcher and torchrun's agent, to two processes ---------------------------------

# Takes the place of `-m train`, and makes a fault of it.
FAULTY_MAIN = """\
import os, pickle, sys
from pathlib import Path
root, job = {root!r}, Path({job!r})
sys.path[:] = [root, *(path for path in sys.path if Path(path or ".").resolve() != Path.cwd())]
del sys.modules["train"]
if {engine!r}:
    from tests.engine_worker import let_engines_run_on_a_cpu
    let_engines_run_on_a_cpu()
else:
    os.environ["ACCELERATE_USE_CPU"] = "true"
from tests.faulty_training import train_child
sys.exit(train_child(job / "config.toml", pickle.loads((job / "fault").read_bytes())))
"""


def launch(checkout: Checkout, config: Config, fault: Fault, engine: str = "") -> tuple[subprocess.Popen[bytes], Path]:  # noqa: F811
    """launch.sh as it is, on a machine with two made-up cards; the processes train on the CPU."""
    checkout.install(record_only=False)
    shutil.copy(Path(sys.executable).parent / "accelerate", checkout.root / ".venv" / "bin" / "accelerate")
    write_script(checkout.tools / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    job = write_config(config).parent
    (job / "fault").write_bytes(pickle.dumps(fault))
    main = FAULTY_MAIN.format(root=str(ROOT), job=str(job), engine=engine)
    write_script(checkout.root / "train" / "__main__.py", main)
    checkout.env |= {name: value for name, value in os.environ.items() if name.startswith(("HF_", "OMP_", "TOKEN"))}
    if engine:
        shutil.copytree(ROOT / "configs", checkout.root / "configs", dirs_exist_ok=True)
        checkout.env["ACCELERATE_CONFIG"] = f"configs/accelerate/{engine}.yaml"
    with (job / "log").open("wb") as log:
        command = [checkout.root / "launch.sh"]
        return subprocess.Popen(command, cwd=checkout.root, env=checkout.env, stdout=log, stderr=log), job


def stop_through_launcher(
    checkout,  # noqa: F811
    config: Config,
    phase: str,
    number: signal.Signals,
    to_rank: bool,
    engine: str = "",
) -> str:
    """A run of two processes that a signal ends, to the launcher or to one of them; what they have said."""
    # The last phases are the main process's alone, when the other has gone.
    rank = 1 if list(PHASES).index(phase) < 4 else 0
    started, job = launch(checkout, config, Fault(waits_in=phase, whole_job=True, rank=rank), engine)
    try:
        wait_for(lambda: (job / "reached").exists() or started.poll() is not None, phase, 240)
        assert started.poll() is None, (job / "log").read_text()
        processes = [int((job / f"pid-{rank}").read_text()) for rank in range(2)]
        os.kill(processes[rank] if to_rank else started.pid, number)
        # A sharded step takes a while on a busy machine, and is waited for; orphans are not.
        assert started.wait(timeout=90 if engine else 15) == 143, (job / "log").read_text()
        assert not [process for process in processes if is_running(process)]
    finally:
        started.kill()
    assert not list((checkout.root / ".venv").glob("statuses-*"))
    return (job / "log").read_text()


def signal_through_launcher(make_config, checkout, undisturbed, phase, number, to_rank) -> None:  # noqa: F811
    name = f"{'rank' if to_rank else 'launcher'}-{list(PHASES).index(phase)}"
    config = make_job(make_config, name, phase, "train.gradient_accumulation=1")
    said = stop_through_launcher(checkout, config, phase, number, to_rank)
    check_what_is_left(config, phase, undisturbed, said)


def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(make_config, checkout, undisturbed):  # noqa: F811
    signal_through_launcher(make_config, checkout, undisturbed, "a step is taken", signal.SIGUSR1, to_rank=True)


@pytest.mark.slow
def test_launcher_and_processes_end_in_every_phase(make_config, checkout, undisturbed):  # noqa: F811
    for place, phase in enumerate(PHASES):
        number = SIGNALS[place % 3]
        signal_through_launcher(make_config, checkout, undisturbed, phase, number, to_rank=bool(place % 2))


# Each signal once to the launcher and once to a single rank.
SHARDED = {"fsdp2": (False, True, False), "zero2": (True, False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_under_a_sharding_engine_a_signal_leaves_a_checkpoint_that_goes_on_to_the_same_bytes(
    make_config,
    checkout,  # noqa: F811
    undisturbed,
    engine,
):
    for number, to_rank, phase in zip(SIGNALS, SHARDED[engine], (*IN_TRAINING, "a step is taken"), strict=True):
        name = f"{engine}-{number.name}"
        config = make_job(make_config, name, phase, "train.gradient_accumulation=1")
        said = stop_through_launcher(checkout, config, phase, number, to_rank, engine)
        assert said.count("stopping after high step 1, which is saved") == (phase == "a step is taken")
        assert said.count(f"stopped by {number.name}") == 1
        if number == SIGNALS[0]:  # goes on as it was begun; the others in one process, which is quicker
            resumed, job = launch(checkout, config, Fault(), engine)
            assert resumed.wait(300) == 0, (job / "log").read_text()
            assert "going on from high step 1" in (job / "log").read_text()
            assert result(config) == undisturbed
        else:
            check_what_is_left(config, phase, undisturbed, said)


@pytest.mark.parametrize(("content", "expected"), [("nonsense = 1\n", 2), ("raise SystemExit(7)\n", 1)])
def test_a_failure_of_the_processes_is_the_commands_failure(checkout, content, expected):  # noqa: F811
    """Exit codes 2 and 3 come through accelerate's launcher, which itself ends with 1 for everything."""
    checkout.install(record_only=False)
    shutil.copy(Path(sys.executable).parent / "accelerate", checkout.root / ".venv" / "bin" / "accelerate")
    write_script(checkout.tools / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    main = content
    if expected == 2:
        (checkout.root / "configs" / "pocket.toml").write_text(content)
        # The trainer's own command line: a bad configuration is found before anything heavy is imported.
        main = (
            f"import sys; sys.path[:] = [{str(ROOT)!r}, *sys.path[1:]]; del sys.modules['train'];"
            "from train.__main__ import main; sys.exit(main())"
        )
    write_script(checkout.root / "train" / "__main__.py", main)
    done = subprocess.run(
        [checkout.root / "launch.sh"], cwd=checkout.root, env=checkout.env, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stderr


# --- what a signal does ----------------------------------------------------------------------------------------------


def test_a_signal_that_waits_is_raised_when_the_wait_ends():
    stop = StopRequest()
    with pytest.raises(Stopped, match="SIGUSR1"), stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # a second one ends the process
    assert not issubclass(Stopped, Exception)  # or a library's `except Exception` would swallow it


def test_a_signal_during_the_imports_is_143_without_a_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "--config", "configs/pocket.toml", f"run.folder='{tmp_path}'"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "stopped by SIGINT; the same command goes on from here\n"


def stuck(ready: Path, deferred: bool) -> int:
    """Wait in native code, where no handler of Python's runs; a training step takes its time all the same."""
    stop = StopRequest()
    stop.insist(patience_seconds=0.5)
    mutex = ctypes.create_string_buffer(256)
    library = ctypes.CDLL(None)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    if deferred:
        threading.Timer(2.0, lambda: library.pthread_mutex_unlock(mutex)).start()
    ready.touch()
    if not deferred:
        library.pthread_mutex_lock(mutex)
        return 1
    try:
        with stop.deferred():
            library.pthread_mutex_lock(mutex)
            print("the step is done", flush=True)
    except Stopped as stopped:
        return stopped.exit_code
    return 1


@pytest.mark.parametrize("deferred", [False, True])
def test_a_process_that_hangs_in_native_code_ends_too_but_no_step_is_cut_short(tmp_path, deferred):
    statuses = tmp_path / "statuses"
    log = tmp_path / "log"
    child = fork(stuck, tmp_path / "ready", deferred, log=log, environment={STATUSES: str(statuses)})
    wait_for((tmp_path / "ready").exists, "child")
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == 143
    if deferred:
        assert "the step is done" in child.output
    else:
        assert "stopped by SIGTERM" in child.output and statuses.read_text() == "143\n"
