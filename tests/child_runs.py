"""Trainings in forked children, and what they leave."""

import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path

from tests.faulty_training import Fault, train_child
from tests.fork_server import Child, fork
from tests.tiny_runs import write_config
from train.checkpoint import found, verify
from train.config import Config


def start(config: Config, fault: Fault = Fault(), environment: Mapping[str, str] | None = None) -> Child:  # noqa: B008
    environment = {"ACCELERATE_USE_CPU": "true", **(environment or {})}
    log = config.run.folder / f"{config.run.name}-{environment.get('RANK', '0')}.log"
    return fork(train_child, write_config(config), fault, log=log, environment=environment)


def start_pair(config: Config, fault: Fault = Fault()) -> list[Child]:  # noqa: B008
    """Two processes of one training, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(config, fault, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


def finish(config: Config, fault: Fault = Fault()) -> None:  # noqa: B008
    child = start(config, fault)
    assert child.wait() == 0, child.output


def checkpoints(config: Config) -> Path:
    return config.run_folder / "checkpoints"


def result(config: Config) -> dict[str, str]:
    """The hash of each file of both experts in the last checkpoint: weights, optimizer and state."""
    last = found(checkpoints(config))[0]
    assert verify(last) is None
    files = [path for name in ("high", "low") for path in sorted((last / name).glob("*"))]
    return {str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(config: Config) -> dict[tuple[str, int], str]:
    """To the bit, by expert and step; no step comes twice."""
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert len({(line["expert"], line["step"]) for line in lines}) == len(lines)
    return {(line["expert"], line["step"]): float(line["loss"]).hex() for line in lines}
