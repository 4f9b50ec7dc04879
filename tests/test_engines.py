"""One training under every engine that accelerate knows, for real, in two processes on a CPU."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomli_w
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.engine_worker import LAUNCHERS_VARIABLES, forget_accelerator, train_expert
from train.checkpoint import found, load_state
from train.config import Config
from train.engine import make_accelerator
from train.job import make_adapter, train_experts
from train.optim import learning_rate
from train.preparing import prepare_data
from train.signals import StopRequest
from train.state import ExpertState
from train.tracking import Metrics
from wan_finetune.adapters import dead_modules
from wan_finetune.experts import base_folder
from wan_finetune.export import verify_adapter_folder, write_adapter_folder
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.settings import load_settings

ROOT = Path(__file__).parent.parent
ENGINES = ("ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow))
EXACT = ("ddp", "fsdp2", "zero2")
"""Engines in which two processes do the very additions that one does, in the same order."""


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
        timeout_seconds: float = 150,
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
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()[
                -5000:
            ]
            time.sleep(0.02)
        outcomes = [json.loads(file.read_text()) for file in done]
        assert not any("error" in outcome for outcome in outcomes), "\n".join(o.get("error", "") for o in outcomes)
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
            process.kill()


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


# The same global batch of four, in one process and in two. Each process of two has one micro-batch, so that the same
# numbers are added in the same order.
ONE = ("train.batch_size=2", "train.gradient_accumulation=2")
TWO = ("train.batch_size=2", "train.gradient_accumulation=1")


@pytest.fixture(scope="module")
def reference(alone, make_config) -> Trained:
    """Six steps in one process, each of two micro-batches."""
    return alone(make_config(*ONE), 6)


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


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_under_any_engine_train_what_one_does(pair, make_config, reference, engine, tmp_path):
    config = make_config(*TWO)
    trained = pair.train(engine, config, 6)
    assert trained.outcome["losses"] == pytest.approx(reference.outcome["losses"], abs=1e-6, rel=0)
    assert trained.outcome["norms"] == pytest.approx(reference.outcome["norms"], rel=1e-6)
    if engine in EXACT:
        assert same(trained.state, reference.state)
    assert largest_difference(trained.state, reference.state) < 1e-5
    assert trained.outcome["share"] == (0.5 if engine in ("fsdp2", "zero3") else 1)
    assert trained.outcome["freed"]
    # What was trained is whole: every module, and diffusers loads it.
    assert not dead_modules(trained.state.weights)
    adapter = make_adapter(config, "high", trained.state)
    write_adapter_folder(tmp_path, [adapter])
    verify_adapter_folder(config.model.base, tmp_path, [adapter])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_and_processes_leave_the_batch_and_the_learning_rate_as_they_are(
    pair, make_config, reference, engine
):
    config = make_config("train.batch_size=1", "train.gradient_accumulation=2")
    trained = pair.train(engine, config, 6)
    settings = config.expert("high")
    rates = [learning_rate(step, settings.learning_rate, settings.steps, settings.optimizer) for step in range(6)]
    assert trained.outcome["rates"] == rates == reference.outcome["rates"]
    assert trained.outcome["losses"] == pytest.approx(reference.outcome["losses"], abs=1e-6, rel=0)
    assert largest_difference(trained.state, reference.state) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_in_two_processes_and_again_in_one(pair, alone, make_config, reference, engine):
    one, two = make_config(*ONE), make_config(*TWO)
    first = alone(one, 2)
    second = pair.train(engine, two, 2, start=first)
    third = alone(one, 2, start=second)
    assert third.state.step == 6
    if engine in EXACT:
        assert same(third.state, reference.state)
    assert largest_difference(third.state, reference.state) < 1e-5
    losses = [loss for part in (first, second, third) for loss in part.outcome["losses"]]
    assert losses == pytest.approx(reference.outcome["losses"], abs=1e-6, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_under_a_sharding_engine_a_resumed_run_ends_as_the_uninterrupted_one(pair, make_config, engine):
    config = make_config(*TWO, "lora.rank=3")  # which two processes do not divide
    whole = pair.train(engine, config, 4, expert="low")
    half = pair.train(engine, config, 2, expert="low")
    resumed = pair.train(engine, config, 2, expert="low", start=half)
    assert same(resumed.state, whole.state)
    assert half.outcome["losses"] + resumed.outcome["losses"] == whole.outcome["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_the_gradient_is_clipped_once_whoever_clips(pair, alone, make_config, engine):
    # Clipping scales Adam's first moment by as much, and hardly moves the weights.
    clipped = ("optimizer.gradient_clip=0.01", *TWO)
    free = pair.train(engine, make_config(*TWO), 1)
    held = pair.train(engine, make_config(*clipped), 1)
    assert held.outcome["norms"] == free.outcome["norms"] and free.outcome["norms"][0] > 0.05
    factor = 0.01 / (free.outcome["norms"][0] + 1e-6)
    for index, entry in free.state.optimizer["state"].items():
        moment = held.state.optimizer["state"][index]["exp_avg"]
        assert torch.allclose(moment, entry["exp_avg"] * factor, rtol=1e-5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_in_bf16_the_lora_and_the_time_path_stay_fp32(pair, alone, make_config, engine):
    config = ("model.dtype='bfloat16'", "train.mixed_precision='bf16'", "memory.checkpointing='full'")
    trained = pair.train(engine, make_config(*config, *TWO), 3)
    single = alone(make_config(*config, *ONE), 3)
    dtypes = trained.outcome["dtypes"]
    assert dtypes == single.outcome["dtypes"]
    assert {dtype for name, dtype in dtypes.items() if "lora" in name or "time_embedder" in name} == {"torch.float32"}
    assert dtypes["blocks.0.attn1.to_q.base_layer.weight"] == "torch.bfloat16"
    # A last bit that differs becomes a bf16's last bit, 1/256.
    assert trained.outcome["losses"] == pytest.approx(single.outcome["losses"], abs=1e-4, rel=0)
    assert trained.outcome["freed"]


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["latents", "gradient"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_in_one_process_stops_both_before_the_update(pair, make_config, engine, spoiled):
    config = make_config(*TWO)
    before = pair.train(engine, config, 1)
    stopped = pair.train(engine, config, 3, spoiled=spoiled)
    assert "high expert, step 2" in stopped.outcome["stopped"]
    assert same(stopped.state, before.state)


@pytest.fixture(scope="module")
def whole_job(make_config) -> dict[str, ExpertState]:
    """Both experts of the launched runs below, trained in this process."""
    forget_accelerator()
    config = make_config("run.name='whole'", *SHORT, *ONE)
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    base = base_folder(config.model.base)
    states = train_experts(config, base, data, Metrics(config, accelerator), accelerator, StopRequest())
    forget_accelerator()
    return states


SHORT = (
    *("high.steps=2", "low.steps=2", "train.round_steps=1", "sampling.steps=2"),
    *("sampling.prompts=['A red square moves up in a desert.']", "sampling.seeds=[0]"),
    *("evaluation.prompts=['A blue circle moves down in the night sky.']", "evaluation.seeds=[0]"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3", "two_nodes_ddp", "two_nodes_fsdp2"])
def test_the_whole_job_runs_as_the_shipped_configuration_starts_it(make_config, whole_job, tmp_path, name):
    # Two experts, two turns each; caches filled by both processes; "nodes" that meet at an address.
    config = make_config(f"run.folder='{tmp_path}'", f"data.cache='{tmp_path / 'cache'}'", *SHORT, *TWO)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config.resolved()))
    nodes = 2 if name.startswith("two_nodes") else 1
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    command += ["--num_processes", "2"]
    if nodes == 2:
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port := free_port())]
    trainer = ["-m", "tests.engine_launch", "--config", str(tmp_path / "config.toml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = []
    for node in range(nodes):
        arguments = [*command, "--machine_rank", str(node), *trainer]
        with (tmp_path / f"log-{node}").open("w") as log:
            processes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))
        # Here the second machine would find itself at the first one's address, and take its place.
        if node == 0 and nodes == 2:
            wait_for_port(port)
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.terminate()  # which a launcher passes on; those that are done do not mind
    logs = [(tmp_path / f"log-{node}").read_text() for node in range(nodes)]
    assert codes == [0] * nodes, "\n".join(log[-5000:] for log in logs)
    folder = config.run_folder
    assert (folder / "report.html").is_file()
    assert sum("every key matched" in log for log in logs) == 1  # one main process, not one a node
    for expert, file in {"high": "high_noise", "low": "low_noise"}.items():
        adapter = diffusers_format.read(folder / "adapter" / f"{file}.safetensors", expert)
        differences = [(adapter.weights[k] - v).abs().max() for k, v in whole_job[expert].weights.items()]
        assert float(max(differences)) <= (1e-5 if name == "zero3" else 0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_port(port: int, timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nobody listens on port {port}")
