"""How long an adapter takes to read, every value checked, beside `safetensors.torch.load_file`.

`python -m benchmarks.adapters [--rank 16] [--rounds 15]`

`load_file` maps a file and touches none of its values, so three floors are measured with it: a sum over every value,
which is the least that a check of all of them can cost; the same sum after a copy into memory; and the check alone.
The cases take turns in every round. The figure is the median over rounds of each case's time against `load_file`'s in
the same round, in processor time, which other work on the machine touches least. The file lies in the page cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.reporting import report
from wan_finetune.adapters import Adapter
from wan_finetune.formats.reading import FORMATS, read_file
from wan_finetune.spec import LORA_TARGETS, TransformerDims


def make_adapter(rank: int) -> Adapter:
    """One of the size of A14B's experts."""
    dims = TransformerDims()
    wide = {"ffn.net.0.proj": (dims.width, dims.ffn_dim), "ffn.net.2": (dims.ffn_dim, dims.width)}
    weights = {}
    for block in range(dims.num_layers):
        for target in LORA_TARGETS:
            inputs, outputs = wide.get(target, (dims.width, dims.width))
            weights[f"blocks.{block}.{target}.lora_A.weight"] = torch.randn(rank, inputs)
            weights[f"blocks.{block}.{target}.lora_B.weight"] = torch.randn(outputs, rank)
    return Adapter(expert="high", rank=rank, alpha=float(rank), targets=LORA_TARGETS, weights=weights)


def seconds(case: Callable[[], object]) -> float:
    began = time.process_time()
    case()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "high_noise.safetensors"
        FORMATS["diffusers"].write(file, make_adapter(arguments.rank))
        held = read_file(file)
        cases: dict[str, Callable[[], object]] = {
            "load_file": lambda: load_file(file),
            "load_file_and_sum": lambda: [value.sum() for value in load_file(file).values()],
            "load_file_copy_and_sum": lambda: [value.clone().sum() for value in load_file(file).values()],
            "check_alone": lambda: held.check("it"),
            "read_file": lambda: read_file(file),
        }
        rounds = [{name: seconds(case) for name, case in cases.items()} for _ in range(arguments.rounds)]
        figures: dict[str, object] = {"mebibytes": round(file.stat().st_size / 2**20, 1)}
        for name in cases:
            figures[f"{name}_seconds"] = round(statistics.median(r[name] for r in rounds), 4)
            figures[f"{name}_of_load_file"] = round(statistics.median(r[name] / r["load_file"] for r in rounds), 2)
        figures["read_file_of_load_file_and_sum"] = round(
            statistics.median(r["read_file"] / r["load_file_and_sum"] for r in rounds), 2
        )
    report("adapters", figures, ("torch", "safetensors"))


if __name__ == "__main__":
    main()
