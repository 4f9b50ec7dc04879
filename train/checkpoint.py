"""Checkpoints: one folder holds both experts' states, is written apart, hashed, and published by rename.

accelerate's `save_state` is not used: it restores neither the draws nor the place in the data, and removes the old
checkpoint before the new one is whole. Here randomness is addressed by step, so that a state is weights, optimizer
and a number.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS, ExpertName

from .trainer import ExpertState

MANIFEST = "manifest.json"
EXTRAS = ("average", "taken")
"""Tensors of a state that few configurations have."""
NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(folder: Path, states: Mapping[ExpertName, ExpertState], fingerprint: str, keep: int) -> Path:
    """Write a checkpoint of all experts that have begun, and remove those older than the newest `keep`.

    `fingerprint` names the configuration that the states belong to.
    """
    total = sum(state.step for state in states.values())
    target = folder / f"step-{total:06d}"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        started = {name: state for name, state in states.items() if state.step}
        for name, state in started.items():
            (partial / name).mkdir(parents=True)
            save_file(state.weights, partial / name / "adapter.safetensors")
            for extra in EXTRAS:
                if tensors := getattr(state, extra):
                    save_file(tensors, partial / name / f"{extra}.safetensors")
            tensors, plain = flatten_optimizer(state.optimizer)
            save_file(tensors, partial / name / "optimizer.safetensors")
            (partial / name / "state.json").write_text(json.dumps({"step": state.step, "optimizer": plain}))
        files = {str(p.relative_to(partial)): sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / MANIFEST).write_text(json.dumps({"fingerprint": fingerprint, "files": files}, indent=1))
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
        sync(folder)
    except OSError as error:
        free = shutil.disk_usage(folder).free >> 20
        raise InputError(
            f"{target}: the checkpoint could not be written ({error.strerror}; {free} MiB free); "
            "earlier checkpoints are whole. Make room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in found(folder)[keep:]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, fingerprint: str) -> dict[ExpertName, ExpertState] | None:
    """The newest undamaged checkpoint's states, or None where there is no checkpoint at all.

    Raises:
        InputError: when every checkpoint is damaged, or belongs to another configuration.
    """
    damaged = []
    for checkpoint in found(folder):
        fault = verify(checkpoint)
        if fault is not None:
            damaged.append(f"{checkpoint.name}: {fault}")
            print(f"checkpoint {checkpoint.name} is damaged ({fault}); taking the one before it", flush=True)
            continue
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["fingerprint"] != fingerprint:
            raise InputError(
                f"{checkpoint}: was written with another configuration (model, data, LoRA, flow or training settings "
                "differ), so going on would mix two runs. Give this run another run.name, restore the settings "
                f"({folder.parent / 'config.toml'}), or remove {folder}"
            )
        return {name: load_state(checkpoint / name) for name in EXPERTS if (checkpoint / name).is_dir()}
    if damaged:
        raise InputError(f"{folder}: no checkpoint is whole ({'; '.join(damaged)}). Remove the folder to start anew")
    return None


def load_state(folder: Path) -> ExpertState:
    """One expert's state."""
    plain = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "optimizer.safetensors")
    extras = {name: load_file(path) for name in EXTRAS if (path := folder / f"{name}.safetensors").is_file()}
    return ExpertState(
        step=plain["step"],
        weights=load_file(folder / "adapter.safetensors"),
        optimizer=unflatten_optimizer(tensors, plain["optimizer"]),
        **extras,
    )


def found(folder: Path) -> list[Path]:
    """Published checkpoints, the newest first."""
    names = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(names, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if sha256(checkpoint / name) != expected:
                return f"{name} does not match its hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return f"{MANIFEST} cannot be read"
    return None


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's `state_dict` as tensors by name and plain JSON."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {"groups": state["param_groups"], "values": {}}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                plain["values"][f"{index}.{key}"] = value
    return tensors, plain


def unflatten_optimizer(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain["values"].items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": dict(sorted(state.items())), "param_groups": plain["groups"]}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk: a rename may otherwise outlive the content it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
