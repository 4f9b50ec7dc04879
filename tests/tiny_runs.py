"""Quick runs on the tiny base, and what it means that two of them ended alike."""

from pathlib import Path

import tomli_w
import torch

from train.config import Config
from train.engine import make_accelerator
from train.job import train_experts
from train.preparing import prepare_data
from train.signals import StopRequest
from train.state import ExpertState
from train.tracking import Metrics
from wan_finetune.experts import base_folder
from wan_finetune.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent


def tiny_config(base: Path, shared: Path, folder: Path, *overrides: str) -> Config:
    """The pocket configuration on the tiny base, 4 steps an expert; more overrides may follow."""
    return load_settings(
        Config,
        ROOT / "configs" / "pocket.toml",
        [
            f"model.base='{base}'",
            f"run.folder='{folder}'",
            f"data.cache='{shared / 'cache'}'",
            f"data.sources=[{{path='{shared / 'ember'}', make='wan_finetune.pocket.brand:ember'}}]",
            *["high.steps=4", "low.steps=4", "train.round_steps=2", "train.batch_size=2", "optimizer.warmup_steps=1"],
            *["sampling.steps=2", "sampling.prompts=['A red star moves up in a desert.']"],
            *["evaluation.prompts=['A blue circle moves down in the night sky.']", *overrides],
        ],
    )


def write_config(config: Config) -> Path:
    """The configuration as a file in a folder of its own, beside the run."""
    path = config.run.folder / f"{config.run.name}-job" / "config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    return path


def train(config: Config) -> dict[str, ExpertState]:
    states, _ = train_and_watch(config)
    return states


def train_and_watch(config: Config) -> tuple[dict[str, ExpertState], Metrics]:
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    base = base_folder(config.model.base)
    metrics = Metrics(config, accelerator)
    return train_experts(config, base, data, metrics, accelerator, StopRequest()), metrics


def same(first: ExpertState, second: ExpertState) -> bool:
    """Equal to the bit: step, weights and optimizer."""
    tensors = [(first.weights[name], second.weights[name]) for name in first.weights]
    for index, entry in first.optimizer["state"].items():
        tensors += [(entry[key], second.optimizer["state"][index][key]) for key in entry]
    return (
        first.step == second.step
        and first.weights.keys() == second.weights.keys()
        and all(torch.equal(a, b) for a, b in tensors)
    )


def close(first: ExpertState, second: ExpertState) -> bool:
    """Equal but for the order of additions. Adam's first steps take the sign of a gradient, so the few that are nought
    may end apart; weights of another draw differ by the learning rate, 1e-3, on the average."""
    differences = [(value - second.weights[name]).abs() for name, value in first.weights.items()]
    return float(torch.cat([d.flatten() for d in differences]).mean()) < 1e-5
