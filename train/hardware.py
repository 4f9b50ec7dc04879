"""What a run runs on, without torch: the GPU that is asked for or that is there, its stated rates, and host memory."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from wan_finetune.errors import InputError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuClass:
    """A kind of GPU and the rates at which LoRA training is reckoned to run on it. Stated, not measured here."""

    name: str
    memory_gib: float
    linear_tflops: float
    """Of bf16 matrix products in training, about 60-80 % of the dense peak."""
    attention_tflops: float
    """Of flash attention forward and backward together, about 50-70 % of the dense peak."""
    host_gb_per_second: float
    """From pinned host memory."""


GPU_CLASSES = (
    GpuClass(name="B200", memory_gib=178, linear_tflops=1300, attention_tflops=900, host_gb_per_second=45),
    GpuClass(name="MI300X", memory_gib=192, linear_tflops=550, attention_tflops=380, host_gb_per_second=45),
    GpuClass(name="H200", memory_gib=140, linear_tflops=620, attention_tflops=520, host_gb_per_second=45),
    GpuClass(name="H100", memory_gib=79, linear_tflops=600, attention_tflops=500, host_gb_per_second=45),
    GpuClass(name="RTX PRO 6000", memory_gib=95, linear_tflops=330, attention_tflops=260, host_gb_per_second=45),
    GpuClass(name="A100", memory_gib=79, linear_tflops=230, attention_tflops=175, host_gb_per_second=22),
    GpuClass(name="L40S", memory_gib=44.7, linear_tflops=200, attention_tflops=160, host_gb_per_second=22),
    GpuClass(name="RTX 6000 Ada", memory_gib=47.5, linear_tflops=200, attention_tflops=160, host_gb_per_second=22),
    GpuClass(name="A6000", memory_gib=47.5, linear_tflops=100, attention_tflops=85, host_gb_per_second=22),
    GpuClass(name="RTX 5090", memory_gib=31.8, linear_tflops=170, attention_tflops=140, host_gb_per_second=45),
    GpuClass(name="RTX 4090", memory_gib=24, linear_tflops=135, attention_tflops=115, host_gb_per_second=22),
    GpuClass(name="RTX 3090", memory_gib=24, linear_tflops=58, attention_tflops=50, host_gb_per_second=22),
    GpuClass(name="L4", memory_gib=22.5, linear_tflops=60, attention_tflops=50, host_gb_per_second=11),
    GpuClass(name="RTX 4080", memory_gib=16, linear_tflops=80, attention_tflops=68, host_gb_per_second=22),
)
"""The first of a size is the one that a size alone stands for, but for those in `BY_SIZE`."""

BY_SIZE = ("RTX 4080", "RTX 4090", "RTX 5090", "L40S", "H100", "RTX PRO 6000", "H200", "B200")
"""What a GPU is taken for where only its memory is known, in order of memory."""

CPU_TFLOPS_PER_CORE = 0.03
"""fp32 matrix products of one core; rough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Where the run is planned for."""

    title: str
    count: int
    memory_bytes: float | None
    """Of one GPU; None on the CPU."""
    rates: GpuClass
    is_there: bool
    """Found in this machine, rather than named."""

    @property
    def has_gpu(self) -> bool:
        return self.memory_bytes is not None


def parse_gpu(text: str) -> Hardware:
    """`24GiB`, `4x80GiB`, `H200` or `2xRTX 4090`.

    Raises:
        InputError: none of these.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+?)\s*", text)
    count, what = (int(match[1] or 1), match[2]) if match else (0, "")
    if count < 1:
        raise InputError(f"--gpu {text!r}: say how much memory (24GiB, 4x80GiB) or which GPU ({known_names()})")
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB)", what, re.IGNORECASE):
        unit = {"gib": GIB, "gb": 10**9, "mib": 2**20}[size[2].lower()]
        memory = float(size[1]) * unit
        if memory <= 0:
            raise InputError(f"--gpu {text!r}: a GPU of no memory")
        rates = class_of_size(memory / GIB)
        title = f"GPU as fast as an {rates.name}"
        return Hardware(title=title, count=count, memory_bytes=memory, rates=rates, is_there=False)
    found = class_named(what)
    if found is None:
        raise InputError(f"--gpu {text!r}: say how much memory (24GiB, 4x80GiB) or which GPU ({known_names()})")
    memory = found.memory_gib * GIB
    return Hardware(title=found.name, count=count, memory_bytes=memory, rates=found, is_there=False)


def known_names() -> str:
    return ", ".join(known.name for known in GPU_CLASSES)


def class_named(name: str) -> GpuClass | None:
    """The class whose name is part of this one, the longest first: an L40S is no L4."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    matching = [known for known in GPU_CLASSES if re.sub(r"[^a-z0-9]", "", known.name.lower()) in plain]
    return max(matching, key=lambda known: len(known.name), default=None)


def class_of_size(gib: float) -> GpuClass:
    """The usual GPU of about this memory, or the one below."""
    usual = [known for name in BY_SIZE for known in GPU_CLASSES if known.name == name]
    return max(
        (known for known in usual if known.memory_gib <= gib * 1.05), key=lambda k: k.memory_gib, default=usual[0]
    )


def nvidia_gpus() -> list[tuple[str, float]]:
    """Name and memory in bytes of every GPU that NVIDIA's driver knows; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = [line.rsplit(",", 1) for line in answer.splitlines() if line.strip()]
        return [(name.strip(), float(mebibytes) * 2**20) for name, mebibytes in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def find_hardware() -> Hardware:
    """The GPUs of this machine, or its CPU."""
    gpus = nvidia_gpus()
    if not gpus:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        rate = cores * CPU_TFLOPS_PER_CORE
        rates = GpuClass(name="CPU", memory_gib=0, linear_tflops=rate, attention_tflops=rate, host_gb_per_second=10)
        return Hardware(title=f"CPU, {cores} cores", count=1, memory_bytes=None, rates=rates, is_there=True)
    # The run's pace and room are those of its smallest GPU.
    name, memory = min(gpus, key=lambda gpu: gpu[1])
    rates = class_named(name) or class_of_size(memory / GIB)
    return Hardware(title=name, count=len(gpus), memory_bytes=memory, rates=rates, is_there=True)


def host_memory_bytes() -> int | None:
    """RAM of this machine, or what its container may use of it; None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return total
    return min(total, limit)


def free_disk_bytes(folder: Path) -> int:
    """Free space where `folder` is, or will be."""
    import shutil

    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
