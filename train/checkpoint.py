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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.claims import shared
from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS, ExpertName

from .identity import Identity, require_same_run
from .optimizer_state import flatten_optimizer, unflatten_optimizer
from .state import ExpertState
from .terminal import say

FORMAT = 2
"""Of what a checkpoint holds; another number is refused."""
MANIFEST = "manifest.json"
SAMPLES = "samples.safetensors"
EXTRAS = ("average", "taken")
"""Tensors of a state that few configurations have."""
NAME = re.compile(r"step-(\d{6,})")

States = dict[ExpertName, ExpertState]


class Part(NamedTuple):
    """One expert's share of a checkpoint."""

    expert: ExpertName
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """By the name of their file."""
    plain: dict[str, Any]
    """What of the optimizer is no tensor."""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from training the same run at the same time; a lock that dies with its holder.

    Raises:
        InputError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with shared(folder / ".lock").claim("training") as mine:
        if not mine:
            raise InputError(
                f"{folder.parent}: another process is training this run; wait for it, stop it, or give another run.name"
            )
        yield


def save_checkpoint(folder: Path, states: Mapping[ExpertName, ExpertState], identity: Identity, keep: int) -> Path:
    """Write a checkpoint of all experts that have begun, and remove those older than the newest `keep`.

    At every instant, a whole checkpoint is there if one was before. Only one process may call this.

    Raises:
        InputError: the disk would not take it; earlier checkpoints are whole.
        FloatingPointError: a state is not finite, and a run that goes on from it could never recover.
    """
    parts = [part_of(name, state) for name, state in states.items() if state.step]
    for part in parts:
        require_finite(part)
    total = sum(part.step for part in parts)
    target = folder / f"step-{total:06d}"
    partial = folder / f".{target.name}.partial"
    if target.is_dir() and verify(target) is None:
        return target  # of a stretch in which no step was taken
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(partial, parts, identity)
        if target.exists():
            # Damaged: the run went on from the one before, and is here again.
            retire(target)
        os.rename(partial, target)
        sync(folder)
        # Newer ones are damaged too. They do not count, or the good ones would have to go.
        for old in [path for path in found(folder) if step_of(path) <= total][keep:]:
            retire(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        raise InputError(
            f"{target}: the checkpoint could not be written ({getattr(error, 'strerror', None) or error}): it needs "
            f"about {size_bytes(parts, identity)} bytes, and {free} bytes are free in {folder}. Earlier checkpoints "
            "are whole. Make room and run the same command again"
        ) from error
    return target


def part_of(name: ExpertName, state: ExpertState) -> Part:
    """An expert's state, as files hold it."""
    optimizer, plain = flatten_optimizer(state.optimizer)
    extras = {extra: tensors for extra in EXTRAS if (tensors := getattr(state, extra))}
    return Part(name, state.step, {"adapter": dict(state.weights), "optimizer": optimizer, **extras}, plain)


def write_checkpoint(partial: Path, parts: Sequence[Part], identity: Identity) -> None:
    """Fill a folder and force it to disk; the manifest comes last and vouches for the rest and for itself."""
    for part in parts:
        folder = partial / part.expert
        folder.mkdir(parents=True)
        for name, tensors in part.tensors.items():
            save_file(tensors, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": part.step, "optimizer": part.plain}))
    save_file({"samples": identity.samples}, partial / SAMPLES)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "steps": {part.expert: part.step for part in parts},
        "configuration": dict(identity.values),
        "files": {str(p.relative_to(partial)): sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()},
    }
    (partial / MANIFEST).write_text(json.dumps({**manifest, "sha256": hash_of(manifest)}, indent=1))
    for path in [*partial.rglob("*"), partial]:
        sync(path)


def resume(folder: Path, identity: Identity, accelerator: Accelerator) -> States:
    """The states of the newest undamaged checkpoint, of every expert that has begun; none where there is no checkpoint.

    The main process judges for all: two that judged apart could go on from different checkpoints.

    Raises:
        InputError: every checkpoint is damaged, was written in another format, or belongs to another run.
    """
    answer: list[str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            checkpoint = choose_checkpoint(folder, identity)
            answer[0] = checkpoint.name if checkpoint else None
        except InputError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    name, refusal = answer
    if refusal is not None:
        raise InputError(refusal)
    return load_states(folder / name) if name is not None else {}


def choose_checkpoint(folder: Path, identity: Identity) -> Path | None:
    """The newest undamaged checkpoint, which this run may go on from; None where there is no checkpoint at all.

    What a killed process left half written or half removed goes.
    """
    for leftover in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.retired")]:
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for checkpoint in found(folder):
        if fault := verify(checkpoint):
            damaged.append(f"{checkpoint.name}: {fault}")
            say(f"checkpoint {checkpoint.name} is damaged ({fault}); taking the one before it")
            continue
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        saved = Identity(values=manifest["configuration"], samples=load_file(checkpoint / SAMPLES)["samples"])
        for change in require_same_run(saved, identity, manifest["steps"], str(checkpoint)):
            say(f"warning: changed since {checkpoint.name}, from here on the new value counts: {change}")
        return checkpoint
    if damaged:
        raise InputError(f"{folder}: no checkpoint is whole ({'; '.join(damaged)}). Remove the folder to start anew")
    return None


def load_states(checkpoint: Path) -> States:
    """All experts' states in a checkpoint."""
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: not on this machine; run.folder must lie on a disk that all machines share")
    return {name: load_state(checkpoint / name) for name in EXPERTS if (checkpoint / name).is_dir()}


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
    return sorted(names, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Steps done by all experts together."""
    return int(checkpoint.name.removeprefix("step-"))


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Raises:
        InputError: it is no damage, but a format of another version.
    """
    name = MANIFEST
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        require_format(checkpoint, manifest)
        claimed = manifest.pop("sha256")
        if hash_of(manifest) != claimed:
            return f"{MANIFEST} does not match its hash"
        if sum(manifest["steps"].values()) != step_of(checkpoint):
            return f"{MANIFEST} belongs to another checkpoint"
        for name, expected in manifest["files"].items():
            if sha256(checkpoint / name) != expected:
                return f"{name} does not match its hash"
    except FileNotFoundError:
        return f"{name} is missing"
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be read, {type(error).__name__}"
    return None


def require_format(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse what another version wrote whole; what is damaged is for others to find."""
    written = manifest.get("format", 1 if {"fingerprint", "files"} == manifest.keys() else None)
    if isinstance(written, int) and written != FORMAT and ("sha256" not in manifest or self_consistent(manifest)):
        raise InputError(
            f"{checkpoint}: format {written} of another version of this toolkit; this one reads format {FORMAT}. "
            "Finish the run with the version that began it, or give another run.name to start anew"
        )


def self_consistent(manifest: Mapping[str, Any]) -> bool:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hash_of(rest) == manifest["sha256"]


def require_finite(part: Part) -> None:
    """Keep a broken state off the disk."""
    for key, value in [item for tensors in part.tensors.values() for item in tensors.items()]:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FloatingPointError(
                f"{part.expert} expert, step {part.step}: {key} is not finite after the update, and was not saved; "
                f"earlier checkpoints are whole. A lower learning rate ({part.expert}.learning_rate) helps"
            )


def size_bytes(parts: Sequence[Part], identity: Identity) -> int:
    """What a checkpoint takes on disk, but for a few thousand bytes."""
    held = [value for part in parts for tensors in part.tensors.values() for value in tensors.values()]
    return sum(tensor.nbytes for tensor in [identity.samples, *held])


def retire(checkpoint: Path) -> None:
    """Remove a checkpoint; a process that is killed meanwhile leaves nothing that looks like one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.retired")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
