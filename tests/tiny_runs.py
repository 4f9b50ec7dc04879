"""Quick runs on the tiny base, and what it means that two of them ended alike."""

import torch

from train.config import Config
from train.engine import make_accelerator
from train.job import train_experts
from train.precompute import prepare_data
from train.signals import StopRequest
from train.tracking import Metrics
from train.trainer import ExpertState
from wan_finetune.experts import base_folder


def train(config: Config) -> dict[str, ExpertState]:
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    base = base_folder(config.model.base)
    return train_experts(config, base, data, Metrics(config, accelerator), accelerator, StopRequest())


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
