"""What every benchmark prints and keeps: one JSON line with its figures, the machine, the versions and the date."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def report(name: str, figures: dict[str, Any], packages: tuple[str, ...] = ("torch",)) -> None:
    """Print the figures of a benchmark as one line, and write them to `results/NAME.json`."""
    line = {
        "benchmark": name,
        "figures": figures,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(line))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=2) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
