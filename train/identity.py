"""What a checkpoint belongs to, and what it means for a resumed run when the configuration has changed since.

Every key of the configuration has a rule: its table's, or its own where it differs. A change is
- fatal: going on would mix two runs in one adapter, or the state does not fit; the run stops and says how to mend it;
- warned: a sound training goes on with the new value, though the configuration alone no longer tells how it came about;
- fine: it does not touch the adapters' bytes;
- seen in the samples: what counts is whether other samples came of it, and those are compared.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from data.batches import TrainingData
from data.buckets import Bucket
from wan_finetune.errors import InputError
from wan_finetune.experts import EXPERTS, ExpertName, fingerprint

from .config import Config


class Rule(NamedTuple):
    """What a change of a key means, and why."""

    effect: Literal["fatal", "warned", "fine", "samples"]
    why: str = ""


FINE, SAMPLES, WARNED = Rule("fine"), Rule("samples"), Rule("warned")

RULES: dict[str, Rule] = {
    # A table's name stands for all its keys that have no rule of their own; `expert` stands for high, low and single.
    "run": FINE,
    "run.seed": Rule("fatal", "every draw hangs on it"),
    "model": FINE,  # which weights they are, "base" below says
    "model.dtype": Rule("warned", "the frozen base is rounded in another way"),
    "model.attention": Rule("warned", "sums are taken in another order"),
    "data": SAMPLES,
    "data.caption_dropout": WARNED,
    "data.on_error": FINE,
    "data.decode_timeout_seconds": FINE,
    "data.cache": FINE,
    "data.sources": SAMPLES,
    "data.sources.repeats": Rule("fatal", "clips are visited in another order"),
    "data.sources.weight": Rule("fatal", "clips are visited in another order"),
    "data.sources.experts": Rule("fatal", "the experts see other clips"),
    "data.sources.loss_weight": WARNED,
    # The shared tables count for nothing by themselves: every expert has its own, complete.
    "lora": FINE,
    "flow": FINE,
    "optimizer": FINE,
    "expert.steps": WARNED,  # judged by `steps_rule`
    "expert.learning_rate": WARNED,
    "expert.patience": FINE,
    "expert.lora": Rule("fatal", "the adapter would be another one"),
    "expert.lora.dropout": WARNED,
    "expert.flow": Rule("fatal", "the noise levels are what the adapter was trained for"),
    "expert.lora.start_from": FINE,  # is behind a run that has begun
    "expert.optimizer": Rule("fatal", "its state does not fit another optimizer"),
    "expert.optimizer.weight_decay": WARNED,
    "expert.optimizer.betas": WARNED,
    "expert.optimizer.eps": WARNED,
    "expert.optimizer.gradient_clip": WARNED,
    "expert.optimizer.warmup_steps": WARNED,
    "expert.optimizer.schedule": WARNED,
    "expert.optimizer.restarts": WARNED,
    "expert.optimizer.power": WARNED,
    "expert.optimizer.minimum_factor": WARNED,
    "memory": Rule("warned", "the frozen base or the order of sums may be another"),
    "train": FINE,  # how a global batch is made up; its size, "global_batch" below, is compared
    "train.experts": Rule("fatal", "the checkpoint holds an expert that would be left behind"),
    "train.mixed_precision": Rule("warned", "products are rounded in another way"),
    "sampling": FINE,
    "evaluation": FINE,
    "tracking": FINE,
    "hub": FINE,
    "validation": FINE,
    "validation.clips": SAMPLES,
    "validation.every_steps": SAMPLES,  # with none, nothing is held out
}

DERIVED_RULES: dict[str, Rule] = {
    "base": Rule("fatal", "the adapter fits the weights that it was trained on"),
    "text_encoder": Rule("fatal", "captions would mean something else"),
    "global_batch": Rule("fatal", "each step would see other clips"),
}
"""Of what is no key of the configuration and follows from it."""

REMEDIES: dict[str, str] = {
    "train.experts": "leave it in train.experts (an expert at its last step costs nothing)",
    "expert.steps": "as many steps are done; give at least these, or remove the newer checkpoints",
    "global_batch": "choose train.gradient_accumulation so that batch size x accumulation x processes stays as it was",
    "run.seed": "restore it",
    "base": "restore model.base and model.revision",
}
"""What to do about a fatal change, where it is not to restore the value."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What decides the adapters' bytes."""

    values: Mapping[str, Any]
    """By key: all that a resumed run is compared by, as JSON."""
    samples: Tensor
    """Of each sample, in order, two 63-bit hashes, [N, 2] int64: its clip's name, and all that training sees of it and
    whether it is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A key that differs from the checkpoint's."""

    key: str
    old: Any
    new: Any
    rule: Rule

    def __str__(self) -> str:
        why = f" ({self.rule.why})" if self.rule.why else ""
        return f"{self.key}: {shown(self.old)} -> {shown(self.new)}{why}"


def identity_of(config: Config, base: Path, data: TrainingData, processes: int) -> Identity:
    """The identity of a run: `base` is the diffusers folder, `processes` how many train."""
    values = {key: value for key, value in flatten(config).items() if rule_of(key).effect != "fine"}
    for expert in config.train.experts:
        values[f"base.{expert}"] = fingerprint(base / EXPERTS[expert].component)
    values["text_encoder"] = fingerprint(base / "text_encoder") + fingerprint(base / "tokenizer")
    for bucket in sorted(set(data.samples.column("bucket"))):
        values[f"global_batch.{bucket}"] = global_batch_size(config, Bucket.parse(bucket), processes)
    return Identity(values=values, samples=hash_samples(data))


def global_batch_size(config: Config, bucket: Bucket, processes: int) -> int:
    """Clips of this bucket in one optimizer step."""
    settings = config.train
    micro = settings.batch_size
    if settings.batch_tokens is not None:
        micro = max(1, settings.batch_tokens // bucket.tokens)
    return micro * settings.gradient_accumulation * processes


def flatten(config: Config) -> dict[str, Any]:
    """Every key with its value as JSON, `data.sources.0.path` for example; settings that mean the same are spelled
    alike, and of a path only what tells it from another is kept."""
    tables = config.model_dump()
    for name in EXPERTS:
        if tables[name] is not None and name in config.train.experts:
            lora = config.expert(name).lora
            # Left out it is each module's own rank, which patterns make different ones.
            if not lora.rank_pattern:
                tables[name]["lora"]["alpha"] = lora.scale_alpha
        else:
            del tables[name]
    for source in tables["data"]["sources"]:
        if source["weight"] is None:
            source["repeats"] = source["repeats"] or 1

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {key: v for name, inner in value.items() for key, v in walk(f"{prefix}{name}.", inner).items()}
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            return walk(prefix, dict(enumerate(value)))
        return {prefix.removesuffix("."): value}

    values: dict[str, Any] = json.loads(json.dumps(walk("", tables), default=placeless))
    return values


def placeless(path: Path) -> str:
    """A path's last name, and a hash of the whole: a checkpoint may be handed on, and where things lie is nobody's
    business."""
    return f"{path.name} ({hashlib.sha256(str(path).encode()).hexdigest()[:8]})"


def rule_of(key: str) -> Rule:
    """The rule of the key, or of the nearest table above it. Raises KeyError where there is none."""
    parts = ["expert" if part in EXPERTS else part for part in key.split(".") if not part.isdigit()]
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if rule := RULES.get(name) or DERIVED_RULES.get(name):
            return rule
    raise KeyError(f"{key} has no rule in {Path(__file__).name}: say what a change of it means for a resumed run")


def require_same_run(saved: Identity, current: Identity, done: Mapping[ExpertName, int], where: str) -> list[Change]:
    """The changes that a resumed run should tell of; `done` holds the steps of each expert in the checkpoint.

    Raises:
        InputError: at least one is fatal; all of those are named, with old and new value and the remedy.
    """
    found = changes(saved.values, current.values, done)
    lines = [f"  {change}{remedy(change)}" for change in found if change.rule.effect == "fatal"]
    if difference := compare_samples(saved.samples, current.samples):
        causes = [str(change) for change in found if change.rule.effect == "samples"]
        because = f"; changed were {', '.join(causes)}" if causes else ""
        lines.append(f"  data: {difference}{because}; restore clips and captions as they were")
    if lines:
        raise InputError(
            f"{where}: was written with another configuration, and going on would mix two runs:\n"
            + "\n".join(lines)
            + "\nRestore this, or give the run another run.name to start anew"
        )
    return [change for change in found if change.rule.effect == "warned"]


def changes(old: Mapping[str, Any], new: Mapping[str, Any], done: Mapping[ExpertName, int]) -> list[Change]:
    """Every key that differs and matters: not of an expert that has done nothing yet, nor of a source that is new."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        expert = next((name for name in EXPERTS if name in key.split(".")), None)
        if before == after or (expert is not None and not done.get(expert)):
            continue
        if key == "train.experts":
            lost = [name for name in done if name not in (after or ()) and done[name]]
            rule = rule_of(key) if lost else FINE
        elif expert is not None and expert not in new["train.experts"]:
            continue  # told of as train.experts
        elif key.startswith(("data.sources.", "global_batch.")) and (key not in old or key not in new):
            rule = SAMPLES
        elif expert is not None and key == f"{expert}.steps":
            rule = steps_rule(done[expert], after, new.get(f"{expert}.optimizer.schedule"))
        else:
            rule = rule_of(key)
        found.append(Change(key=key, old=before, new=after, rule=rule))
    return found


def steps_rule(done: int, steps: Any, schedule: Any) -> Rule:
    """A constant learning rate does not know how many steps there are."""
    if steps < done:
        return Rule("fatal", f"{done} are done")
    return FINE if schedule == "constant" else Rule("warned", "the learning rate takes another course")


def remedy(change: Change) -> str:
    """What to do about a fatal change."""
    name = ".".join("expert" if part in EXPERTS else part for part in change.key.split("."))
    advice = next((text for key, text in REMEDIES.items() if name == key or name.startswith(f"{key}.")), None)
    return f"; {advice}" if advice else ""


def hash_samples(data: TrainingData) -> Tensor:
    """`Identity.samples` of the data."""
    content = ("source", "still", "latent_keys", "mask_keys", "captions")
    held_out = iter(data.held_out.tolist())
    rows: list[tuple[int, int]] = []
    for batch in data.samples.table.select(["clip", *content]).to_batches(max_chunksize=4096):
        rows += [
            (hash63([row["source"], row["clip"]]), hash63([next(held_out), *(row[name] for name in content)]))
            for row in batch.to_pylist()
        ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def compare_samples(old: Tensor, new: Tensor) -> str:
    """How many clips were added, removed and changed; empty where all samples are the same, in the same order."""
    if torch.equal(old, new):
        return ""
    before, after = group(old.tolist()), group(new.tolist())
    counts = {
        "added": len(after.keys() - before.keys()),
        "removed": len(before.keys() - after.keys()),
        "changed (frames, captions, masks, windows, or held out)": sum(
            before[name] != after[name] for name in before.keys() & after.keys()
        ),
    }
    told = [f"{count} {'clip' if count == 1 else 'clips'} {what}" for what, count in counts.items() if count]
    return ", ".join(told) or "the same clips in another order"


def group(rows: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Contents by name."""
    groups: dict[int, list[int]] = {}
    for name, content in rows:
        groups.setdefault(name, []).append(content)
    return groups


def hash63(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big") >> 1


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
