"""A conversion from beginning to end: plan, refuse what cannot be done, write, prove, publish."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError
from .journal import Journal, keep_whole_files, opened, partial_folder, publish, refuse_existing
from .pipeline_files import model_index, part_config, scheduler_config
from .planning import ConvertSettings, Plan, make_plan, require_space
from .shards import index_of
from .text_encoder import SPIECE
from .tokenizer import require_tokenizer, tokenizer_from_spiece
from .verification import verify_autoencoder, verify_denoiser, verify_hashes, verify_text_encoder
from .writing import copy_file, hash_file, write_json, write_shard

MANIFEST = "conversion.json"
VERIFY = {
    "WanTransformer3DModel": verify_denoiser,
    "UMT5EncoderModel": verify_text_encoder,
    "AutoencoderKLWan": verify_autoencoder,
}
Report = Callable[[str], None]


def convert(settings: ConvertSettings, report: Report = lambda _line: None) -> Plan:
    """Make the diffusers folder `settings.out`; what was done.

    Args:
        report: is told each file and step as it is done.

    Raises:
        InputError: the checkpoint, the place or the disk is at fault; nothing that could be taken for a whole folder
            is left.
        RuntimeError: the converted models are not the checkpoint.
    """
    refuse_existing(settings.out)
    plan = make_plan(settings)
    with disk_faults_told(settings.out), opened(settings.out, identity_of(settings, plan)) as journal:
        kept = keep_whole_files(journal)
        if kept:
            report(f"{len(kept)} files of an earlier try are whole and kept")
        require_space(plan, journal.folder, set(kept))
        write_all(plan, journal, report)
        require_two_experts(plan, journal)
        if settings.verify:
            verify_all(plan, journal, report)
        journal.make(MANIFEST, partial(write_manifest, settings, plan, journal, report))
        publish(journal, settings.out)
    return plan


def identity_of(settings: ConvertSettings, plan: Plan) -> dict[str, Any]:
    """What must be the same for an earlier try to be gone on with."""
    inputs = {}
    for name, path in plan.inputs().items():
        facts = path.stat()
        inputs[name] = [facts.st_size, facts.st_mtime_ns]
    return {
        "version": __version__,
        "--dtype": settings.dtype,
        "--max-shard-size": settings.max_shard_bytes,
        "input files": inputs,
    }


@contextmanager
def disk_faults_told(out: Path) -> Iterator[None]:
    """A full or failing disk is the user's to mend, and costs only the file that was being written."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} else f"{error.strerror}"
        place = error.filename or partial_folder(out)
        raise InputError(
            f"{place}: {what}; finished files stay in {partial_folder(out)}, and the same command goes on from there"
        ) from error


def write_all(plan: Plan, journal: Journal, report: Report) -> None:
    """Every file that is not finished yet, the large ones first."""
    large = plan.bytes_by_file()
    writers: dict[str, Callable[[Path], str]] = {}
    for name, part, shard in plan.weight_files():
        writers[name] = partial(write_shard, part=part, shard=shard)
    for name, path in plan.copies.items():
        writers[name] = partial(copy_file, path)
    for number, (name, write) in enumerate(writers.items(), start=1):
        if name in journal.done:
            continue
        start = time.monotonic()
        journal.make(name, write)
        seconds = time.monotonic() - start
        report(f"{number}/{len(writers)}  {name}  {large[name] / 1e9:.2f} GB in {seconds:.0f} s")
    for name, content in small_files(plan).items():
        journal.make(name, partial(write_json, content=content))
    if plan.spiece is not None and "tokenizer/tokenizer.json" not in journal.done:
        weights = plan.spiece.weights
        tokenizer = tokenizer_from_spiece(weights.extras[SPIECE], plan.spiece.config["vocab_size"])
        for saved in map(Path, tokenizer.save_pretrained(journal.folder / "tokenizer")):
            if saved.is_file():
                journal.make(saved.relative_to(journal.folder).as_posix(), hash_file)


def require_two_experts(plan: Plan, journal: Journal) -> None:
    """The experts are not one and the same.

    Raises:
        InputError: all their files are equal.
    """
    first, *others = (
        [journal.done[name] for name, owner, _ in plan.weight_files() if owner is part] for part in plan.denoisers
    )
    if first in others:
        files = " and ".join(str(part.weights.files[0]) for part in plan.denoisers)
        raise InputError(
            f"{files}: hold the same weights; the two experts differ, so one of them is a copy of the other"
        )


def small_files(plan: Plan) -> dict[str, Any]:
    """Configurations and indices, by their place."""
    files: dict[str, Any] = {
        "model_index.json": model_index(plan.parts, plan.components),
        "scheduler/scheduler_config.json": scheduler_config(plan.shift),
    }
    for part in plan.parts:
        files[f"{part.folder}/config.json"] = part_config(part, plan.dtypes[part.folder])
        if len(plan.shards[part.folder]) > 1:
            files[f"{part.folder}/{part.weights_name}.safetensors.index.json"] = index_of(plan.shards[part.folder])
    return files


def verify_all(plan: Plan, journal: Journal, report: Report) -> None:
    """Read everything back, and hold each model against the checkpoint."""
    verify_hashes(journal.folder, journal.done)
    for part in plan.parts:
        folder = journal.folder / part.folder
        arguments = (folder, part, plan.shards[part.folder], plan.dtypes[part.folder])
        report(f"{part.folder} is the checkpoint's, to {VERIFY[part.class_name](*arguments):.1g}")
    require_tokenizer(journal.folder / "tokenizer")


def write_manifest(settings: ConvertSettings, plan: Plan, journal: Journal, report: Report, path: Path) -> str:
    """What went in and what came out, each file with its hash and none with a folder of this machine."""
    report("hashing the checkpoint")
    inputs: dict[str, dict[str, str]] = {}
    for part in plan.parts:
        inputs[part.folder] = {file.name: hash_file(file) for file in part.weights.files}
    for name, source in plan.copies.items():
        inputs.setdefault(Path(name).parent.as_posix(), {})[source.name] = journal.done[name]
    weights = {
        part.folder: {
            "weights": len(part.weights.tensors),
            "scaled": sum(stored.scale is not None for stored in part.weights.tensors.values()),
            "left_out": len(part.weights.unused),
        }
        for part in plan.parts
    }
    content = {
        "made_by": f"wan-finetune {__version__}",
        "dtype": settings.dtype,
        "flow_shift": plan.shift,
        "inputs_sha256": inputs,
        "outputs_sha256": {name: digest for name, digest in sorted(journal.done.items()) if name != MANIFEST},
        "weights": weights,
        "verified": settings.verify,
    }
    return write_json(path, content)
