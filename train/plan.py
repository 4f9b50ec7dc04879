"""`python -m train.plan --config C [--gpu 24GiB] [section.key=value ...]`: does it fit, how long does it take.

Exit code 0: it fits; 1: it does not; 2: bad input.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan_view import Exact, Plan
    from .planning import BucketPlan
    from .provisions import RunNumbers


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan",
        description="Say whether a run fits and how long it takes, before anything is loaded.",
        epilog="Exit code 0: it fits; 1: it does not; 2: bad input.",
    )
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/a14b.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file, values in TOML")
    parser.add_argument(
        "--gpu", metavar="GPU", help="24GiB, 4x80GiB, H200, 2xL40S; left out: the GPU that is there, or the CPU"
    )
    parser.add_argument(
        "--exact", action="store_true", help="also trace the real step, on tensors without bytes (takes a minute)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print a plan; 0 when the run fits, 1 when it does not, 2 for bad input."""
    # Options may stand before and after the overrides.
    arguments = make_parser().parse_intermixed_args(argv)
    # The imports wait until the arguments are known to be good: --help answers at once.
    from wan_finetune.errors import InputError

    try:
        plan = make_plan(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(as_json(plan)))
    else:
        from rich.console import Console

        from .plan_view import show

        show(plan, Console())
    return 1 if plan.faults else 0


def make_plan(arguments: argparse.Namespace) -> "Plan":
    """The plan that the arguments ask for.

    Raises:
        InputError: a fault of the configuration, of the base or of --gpu.
    """
    from wan_finetune.settings import load_settings

    from .config import Config
    from .hardware import find_hardware, free_disk_bytes, host_memory_bytes, parse_gpu
    from .plan_numbers import run_numbers
    from .plan_view import Plan
    from .planning import plan_training, total_seconds
    from .provisions import provide

    hardware = find_hardware() if arguments.gpu is None else parse_gpu(arguments.gpu)
    config = load_settings(Config, arguments.config, arguments.overrides)
    run = run_numbers(config)
    rows = plan_training(run.training, hardware)
    return Plan(
        run=run,
        hardware=hardware,
        rows=rows,
        provisions=provide(run, hardware, max(row.peak_bytes for row in rows)),
        seconds=total_seconds(run.training, rows),
        host_memory_bytes=host_memory_bytes() if hardware.is_there else None,
        free_disk_bytes=free_disk_bytes(config.run.folder) if hardware.is_there else None,
        exact=trace(run, rows) if arguments.exact else {},
    )


def trace(run: "RunNumbers", rows: "list[BucketPlan]") -> "dict[str, Exact]":
    """Every bucket traced, equal ones once.

    The trace keeps plain weights and all block inputs on the GPU; what the configuration keeps smaller or elsewhere is
    taken off as it is calculated.
    """
    import torch

    from wan_finetune.step_memory import MemoryPolicy, step_memory
    from wan_finetune.tracing import Traced, TraceSettings, trace_at_depth

    from .plan_view import Exact

    training = run.training
    experts = {expert.name: expert for expert in training.experts}
    done: dict[tuple[object, ...], Traced] = {}
    exact = {}
    for row in rows:
        expert, batch = experts[row.expert], row.bucket.batch
        settings = TraceSettings(
            checkpointing="full" if row.bucket.checkpointing == "offloaded" else row.bucket.checkpointing,
            base_dtype=torch.bfloat16 if training.precision.base_bytes == 2 else torch.float32,
            autocast=training.precision.autocast,
            accumulated=expert.policy.accumulates,
        )
        key = (expert.lora, batch, settings)
        if key not in done:
            done[key] = trace_at_depth(training.dims, expert.lora, batch, settings)
        plain = MemoryPolicy(checkpointing=settings.checkpointing, accumulates=settings.accumulated)
        elsewhere = step_memory(batch, training.dims, expert.lora, training.precision, plain).total - row.memory.total
        exact[f"{row.expert} {row.bucket.name}"] = Exact(
            peak_bytes=round(done[key].peak_bytes - elsewhere), flops=done[key].flops
        )
    return exact


def as_json(plan: "Plan") -> dict[str, object]:
    """The plan's figures: bytes, seconds, operations."""
    from dataclasses import asdict

    rows = [
        {
            "expert": row.expert,
            "bucket": row.bucket.name,
            "clips": row.bucket.batch.clips,
            "tokens": row.bucket.batch.tokens,
            "checkpointing": row.bucket.checkpointing,
            "parts_bytes": asdict(row.memory),
            "margin_bytes": row.margin_bytes,
            "peak_bytes": row.peak_bytes,
            "fits": row.fits,
            "flops": row.flops.total,
            "seconds_per_step": row.seconds,
            "levers": [asdict(lever) for lever in row.levers],
            **({"exact": asdict(plan.exact[f"{row.expert} {row.bucket.name}"])} if plan.exact else {}),
        }
        for row in plan.rows
    ]
    return {
        "run": plan.run.name,
        "base": plan.run.base.title,
        "notes": plan.run.notes,
        "gpu": {"title": plan.hardware.title, "count": plan.hardware.count, "memory_bytes": plan.hardware.memory_bytes},
        "rates": asdict(plan.hardware.rates),
        "steps": rows,
        "stages": [asdict(stage) for stage in plan.provisions.stages],
        "host_bytes": plan.provisions.host_bytes,
        "disk_bytes": plan.provisions.disk_bytes,
        "seconds": {"steps_least": plan.seconds[0], "steps_most": plan.seconds[1],
                    "sampling": plan.provisions.sampling_seconds},
        "does_not_fit": plan.faults,
        "fits": not plan.faults,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
