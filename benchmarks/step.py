"""What the trainer adds to a bare training step. `python -m benchmarks.step`

The bare step is what anybody would write on the same model: forward, backward, clip, fused AdamW, with batch, noise and
noise level at hand. The trainer's step draws them, reads the batch from the cache, checks the result and records it.
Operators are counted at the pocket model's depth and, with little width, at A14B's forty layers; the one `tolist` of
loss and norm, which waits for a GPU, is none. Processor time is taken in interleaved pairs, with bare against bare as
the control. With a model that does next to nothing, what is left is the loop itself.
"""

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.reporting import report
from train.config import Config
from train.engine import make_accelerator
from train.preparing import prepare_data
from train.state import ExpertState
from train.trainer import ExpertTrainer
from wan_finetune.adapters import as_adapter
from wan_finetune.encoders import pad_text
from wan_finetune.experts import base_folder
from wan_finetune.flow import add_noise, timestep, velocity
from wan_finetune.formats import diffusers as diffusers_format
from wan_finetune.lora import LoraSettings
from wan_finetune.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
DEPTH = 40
"""Layers of an expert of A14B."""
SYNCS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default")


class Counter(TorchDispatchMode):
    """Counts operators, and among them those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.syncs = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.operators += 1
        self.syncs += str(function) in SYNCS
        return function(*arguments, **(keywords or {}))


def deep_base(folder: Path) -> Path:
    """The pocket base with two denoisers of forty narrow layers, of random weights."""
    from diffusers import WanTransformer3DModel

    shutil.copytree(base_folder("pocket"), folder)
    for component in ("transformer", "transformer_2"):
        config = WanTransformer3DModel.load_config(folder / component)
        shutil.rmtree(folder / component)
        narrow = {"num_layers": DEPTH, "num_attention_heads": 1, "attention_head_dim": 24, "ffn_dim": 48}
        WanTransformer3DModel.from_config({**config, **narrow}).save_pretrained(folder / component)
    return folder


def make_trainer(folder: Path, clips: int, base: str = "pocket") -> ExpertTrainer:
    """The low-noise expert of the default job, with so many clips in a step."""
    config = load_settings(
        Config,
        ROOT / "configs" / "pocket.toml",
        [
            *[f"run.folder='{folder}'", f"data.cache='{folder}/cache'", f"model.base='{base}'"],
            *["low.steps=100000", f"train.batch_size={clips}"],
        ],
    )
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    return ExpertTrainer(config, "low", ExpertState(), base_folder(base), data, accelerator)


def bare_step(trainer: ExpertTrainer) -> Callable[[], None]:
    """The least that trains the same weights on one batch."""
    model, optimizer, parameters = trainer.model, trainer.optimizer, trainer.parameters
    (batch,) = trainer.load_step(0).micro_batches
    latents = (batch.latents - trainer.latents_mean) / trainer.latents_std
    noise, text = torch.randn_like(latents), pad_text(batch.text)
    sigma = trainer.levels(torch.rand(len(latents)))
    noisy, target, t = add_noise(latents, noise, sigma), velocity(latents, noise), timestep(sigma)

    def step() -> None:
        predicted = model(hidden_states=noisy, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
        loss = (predicted.float() - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count(step: Callable[[], object]) -> tuple[int, int]:
    """Operators and waits of one step, backward included."""
    step()
    with Counter() as counter:
        step()
    return counter.operators, counter.syncs


def counts(trainer: ExpertTrainer, bare: Callable[[], None]) -> dict[str, float]:
    """Operators of the trainer's step beside those of the bare one."""
    (ours, waits), (least, _) = count(trainer.take_step), count(bare)
    return {
        "trainer": ours,
        "bare": least,
        "ratio": ours / least,
        "more_of_them": ours - least,
        "waits_for_the_device": waits,
    }


def cpu_seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def paired(first: Callable[[], object], second: Callable[[], object], pairs: int) -> list[float]:
    """Ratios of processor time, second over first, each pair in the other order than the one before."""
    ratios = []
    for number in range(pairs):
        if number % 2:
            b, a = cpu_seconds(second), cpu_seconds(first)
        else:
            a, b = cpu_seconds(first), cpu_seconds(second)
        ratios.append(b / a)
    return ratios


class Null(nn.Module):
    """A model of one weight, in the place of the expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (hidden_states * self.weight,)


def loop_overhead_ms(trainer: ExpertTrainer, steps: int) -> dict[str, float]:
    """Processor milliseconds a step of the main thread with a model that does nothing; the batch is read by another."""
    null = Null()
    kept = trainer.model, trainer.optimizer, trainer.parameters
    parallel = trainer.parallel.model, trainer.parallel.optimizer
    optimizer = torch.optim.AdamW(null.parameters(), lr=0.0, fused=True)
    trainer.model = trainer.parallel.model = null
    trainer.optimizer = trainer.parallel.optimizer = optimizer
    trainer.parameters = list(null.parameters())
    bare = bare_step(trainer)
    both: dict[str, list[float]] = {"trainer": [], "bare": []}
    for _ in range(steps):
        for name, step in (("trainer", trainer.take_step), ("bare", bare)):
            began = time.thread_time()
            step()
            both[name].append(1000 * (time.thread_time() - began))
    trainer.model, trainer.optimizer, trainer.parameters = kept
    trainer.parallel.model, trainer.parallel.optimizer = parallel
    found = {name: statistics.median(values) for name, values in both.items()}
    return {**found, "overhead": found["trainer"] - found["bare"]}


def update_ratio(rounds: int) -> dict[str, float]:
    """Clip and update of 800 LoRA-like tensors, as the trainer does it, over a plain loop of both."""
    parameters = [nn.Parameter(torch.randn(8, 96)) for _ in range(800)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    fused = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    loop = torch.optim.AdamW(parameters, lr=1e-4, foreach=False, fused=False)

    def ours() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        fused.step()

    def plain() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        loop.step()

    ours(), plain()
    return {"ratio": statistics.median(paired(plain, ours, rounds))}


def file_ratios(folder: Path, rounds: int) -> dict[str, float]:
    """A14B's adapter of rank 32 against safetensors alone: writing with fsync and rename; reading with all checks."""
    wide = {"ffn.net.0.proj": (5120, 13824), "ffn.net.2": (13824, 5120)}
    weights = {}
    for block in range(40):
        for module in LoraSettings().targets:
            inside, outside = wide.get(module, (5120, 5120))
            weights[f"blocks.{block}.{module}.lora_A.weight"] = torch.randn(32, inside)
            weights[f"blocks.{block}.{module}.lora_B.weight"] = torch.randn(outside, 32)
    adapter = as_adapter("low", LoraSettings(rank=32), weights, {}, {})
    ours, raw = folder / "ours.safetensors", folder / "raw.safetensors"

    def seconds(step: Callable[[], object]) -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def write_raw() -> None:
        save_file(weights, raw)
        with raw.open("rb+") as stream:
            os.fsync(stream.fileno())

    writes, reads = [], []
    for _ in range(rounds):
        writes.append(seconds(lambda: diffusers_format.write(ours, adapter)) / seconds(write_raw))
        # Mapped files cost nothing until they are looked at.
        whole = seconds(lambda: [value.sum() for value in load_file(raw).values()])
        checked = seconds(lambda: [value.sum() for value in diffusers_format.read(ours, "low").weights.values()])
        reads.append(checked / whole)
    return {"write": statistics.median(writes), "read": statistics.median(reads), "mib": ours.stat().st_size / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        operators, loop = {}, {}
        deep = str(deep_base(Path(name) / "deep"))
        for base, clips in itertools.product(("pocket", deep), (8, 1)):
            trainer = make_trainer(Path(name), clips, base)
            bare = bare_step(trainer)
            operators[f"{trainer.num_blocks} layers, {clips} clips"] = counts(trainer, bare)
            if base == "pocket":
                loop[f"{clips} clips"] = loop_overhead_ms(trainer, 300)
                if clips == 8:
                    control, ratios = paired(bare, bare, pairs), paired(bare, trainer.take_step, pairs)
            trainer.prefetcher.close()
        files = file_ratios(Path(name), 7)
    report(
        "step",
        {
            "operators": {**operators, "target": 1.01, "target_at": f"{DEPTH} layers"},
            "cpu_time": {
                "pairs": pairs,
                "ratio": statistics.median(ratios),
                "control": statistics.median(control),
                "control_sd": statistics.stdev(control),
                "target": 1.03 + 2 * statistics.stdev(control),
            },
            "loop_ms": {**loop, "target_overhead": 1.0},
            "clip_and_step_of_800_tensors_over_a_loop": {**update_ratio(100), "target": 0.40},
            "adapter_file": {**files, "target_write": 1.6, "target_read": 1.3},
        },
        ("torch", "accelerate", "peft", "diffusers"),
    )


if __name__ == "__main__":
    main()
