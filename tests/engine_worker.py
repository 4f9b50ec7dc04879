"""Processes that train what they are told, under any engine, on a CPU: imports are paid for once for many trainings.

`torchrun --nproc-per-node 2 tests/engine_worker.py FOLDER` takes jobs from FOLDER until it finds `end` there.
"""

import json
import os
import sys
import time
import traceback
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch.distributed.tensor import DTensor

from data.prefetching import Prefetcher
from train.checkpoint import load_state, save_checkpoint
from train.config import Config
from train.engine import engine_name, make_accelerator
from train.identity import identity_of
from train.preparing import prepare_data
from train.state import ExpertState
from train.trainer import ExpertTrainer
from wan_finetune.experts import base_folder

LAUNCHERS_VARIABLES = ("ACCELERATE_", "FSDP_", "DEEPSPEED_")


def let_engines_run_on_a_cpu() -> None:
    """accelerate gives FSDP2 and DeepSpeed to GPUs alone; both run on a CPU, through gloo, when it is told so."""

    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU

    PartialState._prepare_backend = prepare_backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        # It would spend two minutes on building an extension that lets processes of one machine share memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start_anew(variables: dict[str, str]) -> None:
    """The state in which a launcher that sets these variables would have started this process."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS_VARIABLES)]:
        del os.environ[name]
    os.environ.update(variables)
    forget_accelerator()


def forget_accelerator() -> None:
    """accelerate keeps one state a process, which no second configuration may change."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def spoil(trainer: ExpertTrainer, what: str) -> None:
    """Make the second step of this process go wrong."""
    load = trainer.load_step

    def poison(module, inputs, output):
        if trainer.state.step == 1:
            output.register_hook(lambda gradient: gradient * float("inf"))

    def load_step(step):
        work = load(step)
        if step == 1 and what == "latents":
            work.micro_batches[-1].latents[0, 0, 0, 0, 0] = float("nan")
        return work

    trainer.prefetcher = Prefetcher(load_step)
    if what == "gradient":
        modules = trainer.parallel.module.named_modules()
        next(module for name, module in modules if name.endswith("lora_B.default")).register_forward_hook(poison)


def held_share(model: torch.nn.Module) -> float:
    """How much of all weights this process holds."""
    held = total = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            held += parameter.to_local().numel()
            total += parameter.numel()
        elif hasattr(parameter, "ds_tensor"):
            held += parameter.ds_tensor.numel()
            total += parameter.ds_numel
        else:
            held += parameter.numel()
            total += parameter.numel()
    return held / total


def rates_of_groups(optimizer: Any) -> list[float]:
    """The rate of each group, as the optimizer inside of whatever wraps it has it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return [group["lr"] for group in optimizer.param_groups]


def train_expert(
    config: Config, expert: str, start: Path | None, steps: int, result: Path, spoiled: str = "", of_rank: int = 0
) -> dict:
    """Take some steps of one expert, from a checkpoint's folder or from nothing, and leave a checkpoint in `result`."""
    accelerator = make_accelerator(config)
    data = prepare_data(config, accelerator)
    state = load_state(start / expert) if start is not None else ExpertState()
    base = base_folder(config.model.base)
    trainer = ExpertTrainer(config, expert, state, base, data, accelerator)
    if spoiled and accelerator.process_index == of_rank:
        spoil(trainer, spoiled)
    records, stopped, group_rates = [], "", []
    try:
        for _ in range(steps):
            records.append(asdict(trainer.take_step()))
            group_rates.append(rates_of_groups(trainer.optimizer))
            trainer.save_state()  # as before a checkpoint, which must move nothing
    except FloatingPointError as error:
        stopped = str(error)
    dtypes = {name: str(parameter.dtype) for name, parameter in trainer.parallel.module.named_parameters()}
    share = held_share(trainer.parallel.module)
    model = weakref.ref(trainer.parallel.module)
    trainer.close()
    if accelerator.is_main_process:
        identity = identity_of(config, base, data, accelerator.num_processes)
        save_checkpoint(result, {expert: state}, identity, keep=2)
    accelerator.wait_for_everyone()
    return {
        "engine": engine_name(accelerator),
        "processes": accelerator.num_processes,
        "losses": [record["loss"] for record in records],
        "norms": [record["gradient_norm"] for record in records],
        "rates": [record["learning_rate"] for record in records],
        "group_rates": group_rates,
        "stopped": stopped,
        "dtypes": dtypes,
        "share": round(share, 1),
        "freed": model() is None or not any(p.numel() + p.ds_tensor.numel() for p in model().parameters()),
    }


def serve(folder: Path) -> None:
    """Do one job after the other; what each gave, or its traceback, is written beside it."""
    number, rank = 0, os.environ["RANK"]
    while True:
        job_file = folder / f"job-{number}.json"
        while not job_file.exists():
            if (folder / "end").exists():
                return
            time.sleep(0.05)
        job = json.loads(job_file.read_text())
        try:
            start_anew(job["variables"])
            let_engines_run_on_a_cpu()
            start = Path(job["start"]) if job["start"] else None
            config = Config.model_validate(job["config"])
            outcome = train_expert(config, job["expert"], start, job["steps"], Path(job["result"]), job["spoiled"], 1)
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        partial = folder / f"partial-{number}-{rank}"
        partial.write_text(json.dumps(outcome))
        partial.rename(folder / f"done-{number}-{rank}.json")
        number += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]))
