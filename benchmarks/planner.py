"""How right the planner is, and how quick: `python -m benchmarks.planner`

Operations against torch's flop counter and peaks against a traced step (fake tensors), for A14B's dimensions; processor
and wall seconds of `--help` and of a plan in new processes. What no GPU has measured is not in here.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.reporting import report
from wan_finetune.activations import Precision
from wan_finetune.costs import Checkpointing, LoraShape, MicroBatch, step_flops
from wan_finetune.spec import LORA_TARGETS, TransformerDims
from wan_finetune.step_memory import MemoryPolicy, step_memory
from wan_finetune.tracing import TraceSettings, trace_flops, trace_memory

ROOT = Path(__file__).resolve().parent.parent
POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")
BATCHES = {
    "512x512x1": MicroBatch(clips=1, width=512, height=512, num_frames=1),
    "832x480x81": MicroBatch(clips=1, width=832, height=480, num_frames=81),
    "1280x720x81": MicroBatch(clips=1, width=1280, height=720, num_frames=81),
}
LORAS = {
    "r32": LoraShape(rank=32, targets=LORA_TARGETS),
    "r128-attention": LoraShape(rank=128, targets=tuple(t for t in LORA_TARGETS if t.startswith("attn"))),
}
COMMANDS = {
    "help": ["--help"],
    "plan": ["--config", "configs/a14b.toml", "--gpu", "24GiB"],
}


def ratios(num_layers: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Planned over traced: operations, peak, and peak without the base's weights."""
    found = {}
    for layers in num_layers:
        dims = replace(TransformerDims(), num_layers=layers)
        for bucket, batch in BATCHES.items():
            for name, lora in LORAS.items():
                for policy in POLICIES:
                    settings = TraceSettings(checkpointing=policy)
                    planned = step_memory(batch, dims, lora, Precision(), MemoryPolicy(checkpointing=policy))
                    traced = trace_memory(dims, lora, batch, settings)[0]
                    counted = trace_flops(dims, lora, batch, settings)
                    found[f"{layers} layers, {bucket}, {name}, {policy}"] = {
                        "peak": round(planned.total / traced, 5),
                        "peak_without_base": round((planned.total - planned.base) / (traced - planned.base), 5),
                        "flops": round(step_flops(batch, dims, lora, policy).total / counted, 7),
                    }
    return found


def command_seconds(arguments: list[str], runs: int) -> dict[str, float]:
    """Processor seconds (best and median) and wall seconds (best) of a new process."""
    processor, wall = [], []
    for _ in range(runs):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "train.plan", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - began)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "cpu_seconds": round(min(processor), 3),
        "cpu_seconds_median": round(statistics.median(processor), 3),
        "wall_seconds": round(min(wall), 3),
    }


def span(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], help="depths that are traced")
    parser.add_argument("--runs", type=int, default=9, help="new processes for each command")
    arguments = parser.parse_args()
    found = ratios(tuple(arguments.layers))
    report(
        "planner",
        {
            "flops_over_counter": span([r["flops"] for r in found.values()]),
            "peak_over_traced": span([r["peak"] for r in found.values()]),
            "peak_over_traced_without_base": span([r["peak_without_base"] for r in found.values()]),
            "commands": {name: command_seconds(options, arguments.runs) for name, options in COMMANDS.items()},
            "configurations": found,
        },
        ("torch", "diffusers", "peft"),
    )


if __name__ == "__main__":
    main()
