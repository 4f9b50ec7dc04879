"""Trainings of two processes that have imported already, under any engine; and the same in one process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.engine_worker import LAUNCHERS_VARIABLES, forget_accelerator, train_expert
from train.checkpoint import found, load_state
from train.config import Config
from train.state import ExpertState
from wan_finetune.settings import load_settings

ROOT = Path(__file__).parent.parent
EXACT = ("ddp", "fsdp2", "zero2")
"""Engines in which two processes do the very additions that one does, in the same order."""

# The same global batch of four, in one process and in two. Each process of two has one micro-batch, so that the same
# numbers are added in the same order.
ONE = ("train.batch_size=2", "train.gradient_accumulation=2")
TWO = ("train.batch_size=2", "train.gradient_accumulation=1", "memory.checkpointing='full'")


def launchers_variables(engine: str) -> dict[str, str]:
    """What `accelerate launch` with the shipped configuration sets in each process."""
    file = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    arguments, defaults, said = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "-m", "train"])
    )
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if said else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(LAUNCHERS_VARIABLES)}


@dataclass
class Trained:
    """What a training gave."""

    outcome: dict
    folder: Path
    """Checkpoint that it left."""
    states: dict[str, ExpertState] = field(init=False)

    def __post_init__(self) -> None:
        self.states = {path.name: load_state(path) for path in self.folder.iterdir() if path.is_dir()}

    @property
    def state(self) -> ExpertState:
        (state,) = self.states.values()
        return state


@dataclass
class Pair:
    """Two processes that wait for jobs."""

    folder: Path
    process: subprocess.Popen
    jobs: int = 0

    def train(
        self,
        engine: str,
        config: Config,
        steps: int = 4,
        *,
        expert: str = "high",
        start: Trained | None = None,
        spoiled: str = "",
        timeout_seconds: float = 300,
    ) -> Trained:
        number, self.jobs = self.jobs, self.jobs + 1
        result = self.folder / f"result-{number}"
        job = {
            "variables": launchers_variables(engine),
            "config": config.model_dump(mode="json"),
            "expert": expert,
            "start": str(start.folder) if start else None,
            "steps": steps,
            "result": str(result),
            "spoiled": spoiled,
        }
        (self.folder / "partial").write_text(json.dumps(job))
        (self.folder / "partial").rename(self.folder / f"job-{number}.json")
        done = [self.folder / f"done-{number}-{rank}.json" for rank in range(2)]
        deadline = time.monotonic() + timeout_seconds
        while not all(file.exists() for file in done):
            # One that has failed is waited for by the other, in vain.
            for file in done:
                if file.exists() and (error := json.loads(file.read_text()).get("error")):
                    self.process.terminate()
                    pytest.fail(error)
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()[
                -5000:
            ]
            time.sleep(0.02)
        outcomes = [json.loads(file.read_text()) for file in done]
        assert (outcomes[0]["engine"], outcomes[0]["processes"]) == (engine, 2)
        assert outcomes[0] == outcomes[1]
        return Trained(outcomes[0], found(result)[0])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Pair]:
    """Two processes of one group, as torchrun starts them."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(ROOT / "tests" / "engine_worker.py"), str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        yield Pair(folder, process)
        (folder / "end").touch()
        try:
            process.wait(30)
        finally:
            process.terminate()  # and not kill, which would leave its processes behind
            process.wait(60)


@pytest.fixture(scope="module")
def make_config(tiny_base, tmp_path_factory, pair) -> Callable[..., Config]:
    """A quick run of the pocket configuration on the tiny base. `pair` is asked for so that its imports begin now."""
    folder = tmp_path_factory.mktemp("engines")

    def make(*overrides: str) -> Config:
        return load_settings(
            Config,
            ROOT / "configs" / "pocket.toml",
            [
                f"model.base='{tiny_base}'",
                f"run.folder='{folder}'",
                f"data.cache='{folder / 'cache'}'",
                f"data.sources=[{{path='{folder / 'ember'}', make='wan_finetune.pocket.brand:ember'}}]",
                *["high.steps=6", "low.steps=6", "optimizer.warmup_steps=2", *overrides],
            ],
        )

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[..., Trained]:
    """Train in this process."""

    def train(config: Config, steps: int = 4, *, expert: str = "high", start: Trained | None = None) -> Trained:
        result = tmp_path_factory.mktemp("alone")
        forget_accelerator()
        outcome = train_expert(config, expert, start.folder if start else None, steps, result)
        forget_accelerator()
        assert outcome["engine"] == "single"
        return Trained(outcome, found(result)[0])

    return train


def same(first: ExpertState, second: ExpertState) -> bool:
    """Equal to the bit: step, weights and optimizer."""
    return first.step == second.step and largest_difference(first, second) == 0


def largest_difference(first: ExpertState, second: ExpertState) -> float:
    """The largest absolute difference of any weight or any number of the optimizer."""
    assert first.weights.keys() == second.weights.keys()
    for mine, others in zip(first.optimizer["param_groups"], second.optimizer["param_groups"], strict=True):
        assert {**mine, "lr": None} == {**others, "lr": None}  # which is set anew before each step
    assert first.optimizer["state"].keys() == second.optimizer["state"].keys()
    pairs = [(value, second.weights[name]) for name, value in first.weights.items()]
    for index, entry in first.optimizer["state"].items():
        assert entry.keys() == second.optimizer["state"][index].keys()
        pairs += [(entry[key], second.optimizer["state"][index][key]) for key in entry]
    return max(float((a - b).abs().max()) for a, b in pairs)
