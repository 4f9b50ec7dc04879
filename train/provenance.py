"""What an adapter's file says of its making: public names, numbers and hashes, never a path, a host or a user."""

import hashlib
import json
from pathlib import Path

from data.batches import TrainingData
from data.buckets import Bucket
from wan_finetune import __version__
from wan_finetune.experts import EXPERTS, ExpertName, boundary_ratio

from .config import Config
from .identity import flatten, hash_samples, rule_of

HASH_LETTERS = 16
PLACES = ("data.sources", "model.base", "lora.start_from")
"""Keys that may hold local paths; what lies there is in the hash of the samples, or has a name of its own."""
TURNS = ("train.experts", "train.order", "train.round_steps")


def facts_of_run(config: Config, base: Path, data: TrainingData) -> dict[str, str]:
    """What is the same for all adapters of a run.

    Args:
        base: the diffusers folder.
    """
    buckets = [Bucket.parse(name) for name in set(data.samples.column("bucket"))]
    largest = max(buckets, key=lambda bucket: (bucket.width * bucket.height, bucket.num_frames))
    facts = {
        "resolution": f"{largest.width}x{largest.height}",
        "frames": str(max(bucket.num_frames for bucket in buckets)),
        "dataset": hashlib.sha256(hash_samples(data).numpy().tobytes()).hexdigest()[:HASH_LETTERS],
    }
    boundary, revision = boundary_ratio(base), revision_of(config, base)
    if boundary is not None:
        facts["boundary"] = repr(boundary)
    if revision is not None:
        facts["base_revision"] = revision
    return facts


def facts_of_expert(config: Config, name: ExpertName, step: int) -> dict[str, str]:
    """What the configuration and the state of an expert say."""
    return {
        "base": config.model.public_name,
        "trigger": config.data.trigger,
        "steps": str(step),
        "training_shift": repr(config.expert(name).flow.shift),
        "sampling_shift": repr(config.sampling.shift),
        "fps": repr(config.data.fps),
        "licence": config.hub.license,
        "configuration": configuration_hash(config, name),
        "toolkit": f"wan-finetune {__version__}",
    }


def configuration_hash(config: Config, name: ExpertName) -> str:
    """Equal for trainings of an expert that differ in nothing but where things lie, what is shown, and whose turn it is
    when: the other expert, and the order of the two, touch no byte of this one's adapter.
    """
    apart = (*PLACES, *TURNS, *(f"{other}." for other in EXPERTS if other != name))
    values = {
        key: value
        for key, value in flatten(config).items()
        if rule_of(key).effect != "fine" and not any(key.startswith(each) or f".{each}" in key for each in apart)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_LETTERS]


def revision_of(config: Config, base: Path) -> str | None:
    """The commit of a base from the Hub, by the folder that its cache has it in; else what was asked for."""
    return base.name if base.parent.name == "snapshots" else config.model.revision
