"""Full weights with the adapter merged in: a diffusers folder that needs no LoRA any more."""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..adapters import Adapter
from ..errors import InputError
from ..experts import EXPERTS, HIGH, LOW, SINGLE, Expert, ExpertName, boundary_ratio, fingerprint
from ..weight_files import read_json, stored_weights
from .merged_denoiser import require_fits, without_paths, write_denoiser, write_json, written_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
JOB = "job.json"
"""In a folder that is not ready: what is being made, so that the same command goes on with it."""
MERGED = "merged.json"
"""In a ready folder: what was merged, with no paths."""
FACTS = ("trigger", "operation", "sampling_shift", "fps")
"""Of each adapter, in `merged.json`."""
SCHEDULER = "scheduler/scheduler_config.json"
SPARE_BYTES = 64 << 20
"""Room for headers and configurations."""


def components_of(folder: Path) -> list[str]:
    """The components that a pipeline's index names, which are its folders."""
    index = read_json(folder / "model_index.json")
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def write_merged(
    base: Path,
    adapters: Sequence[Adapter],
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    strengths: tuple[float, float] = (1.0, 1.0),
    name: str = "",
    link: bool = True,
) -> list[str]:
    """Write the whole base with the adapters merged in.

    It is written beside `out` and renamed at the end. The same call after an interruption keeps the shards that were
    ready. A denoiser without an adapter is brought to `dtype` as well.

    Args:
        base: a diffusers folder.
        adapters: of different experts.
        out: a folder that is not there yet, or an empty one.
        dtype: of the denoisers' weights but those that diffusers keeps in fp32.
        strengths: of the high-noise and the low-noise adapter; a base with one denoiser takes the first.
        name: how `merged.json` calls the base, and what the adapters' own base is compared with.
        link: whether the other components are hard links where the disk allows it.

    Returns:
        What to tell the user.

    Raises:
        InputError: a base that is quantised or of another size, no room on the disk, or an `out` that is in use.
    """
    if odd := [strength for strength in strengths if not math.isfinite(strength)]:
        raise InputError(f"a strength of {odd[0]} is no number; give one such as 0.8")
    of: dict[ExpertName, float] = {"high": strengths[0], "low": strengths[1], "single": strengths[0]}
    experts = [HIGH, LOW] if boundary_ratio(base) is not None else [SINGLE]
    by_expert = {adapter.expert: adapter for adapter in adapters}
    assert len(by_expert) == len(adapters), "one adapter an expert"
    stored = {expert.name: stored_weights(base / expert.component) for expert in experts}
    for adapter in adapters:
        if adapter.expert not in stored:
            has = "one denoiser" if len(experts) == 1 else "a high-noise and a low-noise expert"
            raise InputError(f"the adapter of {EXPERTS[adapter.expert].title} does not fit this base, which has {has}")
        require_fits(adapter, stored[adapter.expert])
    partial = out.with_name(f".{out.name}.partial")
    start(partial, out, job_of(base, adapters, dtype, of))
    needed = sum(written_bytes(name, head, dtype) for each in stored.values() for name, head in each.heads.items())
    if not link or base.stat().st_dev != partial.stat().st_dev:
        needed += sum(file.stat().st_size for file in rest_of(base, {expert.component for expert in experts}))
    require_room(partial, out, needed)
    try:
        for expert in experts:
            target = partial / expert.component
            write_denoiser(stored[expert.name], target, by_expert.get(expert.name), of[expert.name], dtype)
        copy_rest(base, partial, {expert.component for expert in experts}, link=link)
    except InputError:
        shutil.rmtree(partial)
        raise
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{out}: could not be written ({error}); what is ready stays in {partial}, and the same command goes on "
            "with it"
        ) from error
    lines = [*warnings_of(experts, adapters, name), *follow_shift(partial, adapters)]
    write_json(partial / MERGED, facts_of(name or base.name, adapters, dtype, of))
    os.rename(partial, out)
    (out / JOB).unlink()
    return [str(out), *lines]


def warnings_of(experts: Sequence[Expert], adapters: Sequence[Adapter], name: str) -> list[str]:
    """What is odd about a merge and no fault."""
    having = {adapter.expert for adapter in adapters}
    lines = [f"warning: {e.title} has no adapter; its weights are the base's" for e in experts if e.name not in having]
    for adapter in adapters:
        trained_for = adapter.about.get("base", name)
        if name and trained_for.rpartition("/")[2] != name.rpartition("/")[2]:
            title = EXPERTS[adapter.expert].title
            lines.append(f"warning: the adapter of {title} was trained for {trained_for}, and this is {name}")
    return lines


def job_of(
    base: Path, adapters: Sequence[Adapter], dtype: torch.dtype, strengths: Mapping[ExpertName, float]
) -> dict[str, Any]:
    """What tells a merge from another one."""
    job: dict[str, Any] = {"base": fingerprint(base), "dtype": str(dtype)}
    for adapter in adapters:
        digest = hashlib.sha256()
        for name, value in sorted(adapter.weights.items()):
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().data)
        scales = [repr(adapter.scale(module)) for module in adapter.modules]
        digest.update(f"{scales} {adapter.dora} {sorted(adapter.about.items())}".encode())
        job[adapter.expert] = [digest.hexdigest(), strengths[adapter.expert]]
    return job


def start(partial: Path, out: Path, job: dict[str, Any]) -> None:
    """Make the folder that is written to, or find the one that the same job left behind.

    Raises:
        InputError: when `out` is in use, or the other folder is none of ours.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; give another folder")
    if partial.exists():
        if not (partial / JOB).is_file():
            raise InputError(f"{partial}: is no folder of an interrupted merge; remove it")
        if read_json(partial / JOB) != job:
            shutil.rmtree(partial)
        # A process that was killed leaves what it was writing.
        for torn in list(partial.rglob(".*.partial")):
            torn.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / JOB, job)


def require_room(partial: Path, out: Path, size_bytes: int) -> None:
    """Whether the disk holds what is not there yet of this size.

    Raises:
        InputError: saying how much is needed and how much there is.
    """
    # A linked file takes no room, and is not part of the size.
    files = [file.stat() for file in partial.rglob("*") if file.is_file() and file.name != JOB]
    ready = sum(file.st_size for file in files if file.st_nlink == 1)
    needed = size_bytes + SPARE_BYTES - ready
    if (free := shutil.disk_usage(partial).free) < needed:
        if not ready:
            shutil.rmtree(partial)
        raise InputError(
            f"{out}: needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; give a folder on another disk"
        )


def rest_of(base: Path, done: set[str]) -> list[Path]:
    """Files of the components that are not merged."""
    components = sorted(set(components_of(base)) - done)
    return [path for component in components for path in sorted((base / component).rglob("*")) if path.is_file()]


def copy_rest(base: Path, partial: Path, done: set[str], *, link: bool) -> None:
    """Link or copy the components that were not merged; configurations lose what may be a path."""
    for file in rest_of(base, done):
        target = partial / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            continue
        config = read_json(file) if file.name.endswith("config.json") else {}
        if without_paths(config) != config:
            write_json(target, without_paths(config))
        else:
            put(file.resolve(), target, link=link)
    for file in (path for pattern in ("LICENSE*", "NOTICE*") for path in base.glob(pattern) if path.is_file()):
        put(file.resolve(), partial / file.name, link=False)
    write_json(partial / "model_index.json", without_paths(read_json(base / "model_index.json")))


def put(file: Path, target: Path, *, link: bool) -> None:
    """Link a file, or copy it where that is not wanted or the disk is another one."""
    if link:
        try:
            os.link(file, target)
            return
        except OSError:
            pass
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(file, partial)
    os.replace(partial, target)


def follow_shift(folder: Path, adapters: Sequence[Adapter]) -> list[str]:
    """Make the sampler's flow shift the one that the adapters were previewed with, as `load_pipeline` does."""
    recorded = next((a.about["sampling_shift"] for a in adapters if "sampling_shift" in a.about), None)
    if recorded is None:
        return []
    config = read_json(folder / SCHEDULER) if (folder / SCHEDULER).is_file() else {}
    if "flow_shift" not in config:
        return [f"warning: the adapter was previewed with a flow shift of {recorded}; this base's sampler has none"]
    if config["flow_shift"] == float(recorded):
        return []
    write_json(folder / SCHEDULER, {**config, "flow_shift": float(recorded)})
    return [f"the sampler's flow shift is {recorded}, which the adapter was previewed with, not {config['flow_shift']}"]


def facts_of(
    base: str, adapters: Sequence[Adapter], dtype: torch.dtype, strengths: Mapping[ExpertName, float]
) -> dict[str, Any]:
    """What a merged folder says of itself."""
    parts = [
        {
            "expert": adapter.expert,
            "strength": strengths[adapter.expert],
            **{fact: adapter.about[fact] for fact in FACTS if fact in adapter.about},
        }
        for adapter in adapters
    ]
    return {"base": base, "dtype": str(dtype).removeprefix("torch."), "adapters": parts}
