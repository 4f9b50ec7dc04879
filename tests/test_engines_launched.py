"""Runs that accelerate's launcher starts with the shipped configurations, under every engine on a CPU."""

import os
import socket
import subprocess
import sys
import time

import pytest
import tomli_w

from tests.engine_runs import ONE, ROOT, TWO
from tests.engine_worker import forget_accelerator
from tests.tiny_runs import tiny_config, train
from train.state import ExpertState
from wan_finetune.formats import diffusers as diffusers_format

SHORT = (
    *("high.steps=2", "low.steps=2", "train.round_steps=1", "sampling.steps=2"),
    *("sampling.prompts=['A red square moves up in a desert.']", "sampling.seeds=[0]"),
    *("evaluation.prompts=['A blue circle moves down in the night sky.']", "evaluation.seeds=[0]"),
)


@pytest.fixture(scope="module")
def whole_job(tiny_base, shared, tmp_path_factory) -> dict[str, ExpertState]:
    """Both experts of the launched runs below, trained in this process."""
    forget_accelerator()
    states = train(tiny_config(tiny_base, shared, tmp_path_factory.mktemp("whole"), *SHORT, *ONE))
    forget_accelerator()
    return states


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
