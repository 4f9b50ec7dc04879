"""The training loop behind every stage of the pocket build: resumable, seeded by step, with a moving average."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def learning_rate_scale(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 %; a pure function of the step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress))


def fit(
    *,
    name: str,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[int, np.random.Generator], Tensor],
    steps: int,
    seed: int,
    folder: Path,
    ema_decay: float,
    warmup: int = 100,
    save_every_seconds: float = 120.0,
) -> None:
    """Minimise `loss(step, rng)` and leave the moving average of the weights in `modules`.

    Run again after an interruption, it goes on from the last state in `folder`: the draws of a step come from
    (seed, step) alone, so the way there does not matter.
    """
    parameters: dict[str, Tensor] = {
        f"{prefix}.{key}": value
        for prefix, module in modules.items()
        for key, value in module.named_parameters()
        if value.requires_grad
    }
    average = {key: value.detach().clone() for key, value in parameters.items()}
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    state_file, weights_file = folder / f"{name}.state.pt", folder / f"{name}.safetensors"
    start = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        start = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        saved_weights = load_file(weights_file)
        for key, value in parameters.items():
            value.data.copy_(saved_weights[f"now.{key}"])
            average[key].copy_(saved_weights[f"average.{key}"])
        print(f"[{name}] resumed at step {start} of {steps}", flush=True)

    def save(step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"now.{k}": v.detach().contiguous() for k, v in parameters.items()}
        tensors |= {f"average.{k}": v.contiguous() for k, v in average.items()}
        save_file(tensors, f"{weights_file}.tmp")
        torch.save({"step": step, "optimizers": [o.state_dict() for o in optimizers]}, f"{state_file}.tmp")
        os.replace(f"{weights_file}.tmp", weights_file)
        os.replace(f"{state_file}.tmp", state_file)

    began = saved_at = time.monotonic()
    recent: list[float] = []
    for step in range(start, steps):
        scale = learning_rate_scale(step, steps, warmup)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        rng = np.random.default_rng([seed, step])
        torch.manual_seed(int(rng.integers(2**62)))
        value = loss(step, rng)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.data for p in parameters.values()], 1.0 - decay)
        recent.append(value.item())
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"stage {name}: the loss is {recent[-1]} at step {step}")
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1 - start)
            left = pace * (steps - step - 1) / 60.0
            print(
                f"[{name}] step {step + 1}/{steps}  loss {np.mean(recent[-50:]):.4f}"
                f"  {pace:.2f} s/step  {left:.1f} min left",
                flush=True,
            )
        if time.monotonic() - saved_at > save_every_seconds:
            save(step + 1)
            saved_at = time.monotonic()
    if start < steps:
        save(steps)
    for key, value in parameters.items():
        value.data.copy_(average[key])
