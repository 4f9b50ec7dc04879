"""One walk over all sources: the report's lines, the table of samples, and what to do about faults."""

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wan_finetune.errors import InputError

from .cache import Cache
from .clips import Clip, Row, find_clips
from .config import DataConfig
from .filling import is_complete
from .inspection import Inspector
from .samples import Sample, SampleTable, samples_of, write_samples
from .sources import read_source

LARGEST_SHARE_SKIPPED = 0.05
"""Under on_error = "skip": with more faults than this, something is wrong with the whole."""
FAULTS_SHOWN = 50


@dataclass(kw_only=True)
class Survey:
    """What a walk over all sources has found."""

    report: Path
    """data_report.jsonl, a line for each clip."""
    samples: Path = Path()
    """The table of samples."""
    used: int = 0
    passed_over: int = 0
    """Shots shorter than every bucket."""
    faults: list[str] = field(default_factory=list)
    """Name, fault and remedy of what is left out."""


def require_sources(config: DataConfig) -> None:
    """Look at the beginning of every local source, so that a wrong path is told before anything is written.

    Raises:
        InputError: a source is unusable.
    """
    for source in config.sources:
        if source.path is not None:
            next(read_source(source, config.cache / "media"), None)


def take_survey(config: DataConfig, inspector: Inspector, report: Path, encoder: str) -> Survey:
    """Look at everything that the sources name; write the report, and the samples into the cache's folder.

    Raises:
        InputError: a source is unusable; any fault under on_error "fail"; too many, or no clip left, under "skip".
            The report is there all the same.
    """
    survey = Survey(report=report)
    partial = report.with_name(f".{report.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as lines:

            def clips() -> Iterator[Clip]:
                for row, clip in find_clips(config, inspector):
                    lines.write(row.to_json() + "\n")
                    if clip is not None:
                        survey.used += 1
                        yield clip
                    elif row.fault:
                        survey.faults.append(describe(config, row))
                    else:
                        survey.passed_over += 1

            survey.samples = write_samples(
                config.cache / "samples", (s for clip in clips() for s in to_samples(clip, config, inspector, encoder))
            )
        os.replace(partial, report)
    finally:
        partial.unlink(missing_ok=True)
    decide(config, survey)
    return survey


def to_samples(clip: Clip, config: DataConfig, inspector: Inspector, encoder: str) -> list[Sample]:
    """The samples of a clip, under the window mode of its source."""
    draw = config.windows_of(config.sources[clip.source])[0] == "random"
    mask_sha256 = inspector.sha256(clip.mask) if clip.mask else None
    return samples_of(
        clip,
        fps=config.fps,
        draw_window=draw,
        encoder=encoder,
        with_std=config.latent_std,
        mask_sha256=mask_sha256,
    )


def describe(config: DataConfig, row: Row) -> str:
    """A fault as the terminal shows it; there the source may be named by its path."""
    return f"{config.sources[row.source].title}/{row.file}: {row.reason}"


def decide(config: DataConfig, survey: Survey) -> None:
    """Raise InputError where the faults forbid to go on."""
    total = survey.used + len(survey.faults)
    listed = "\n".join(f"  {fault}" for fault in survey.faults[:FAULTS_SHOWN])
    if len(survey.faults) > FAULTS_SHOWN:
        listed += f"\n  and {len(survey.faults) - FAULTS_SHOWN} more, all of them in {survey.report}"
    if survey.faults and config.on_error == "fail":
        raise InputError(
            f"{len(survey.faults)} of {total} clips cannot be used:\n{listed}\n"
            'Mend them, or set data.on_error = "skip" to leave them out.'
        )
    if not survey.used:
        raise InputError(f"no clip is left of {total}; mend at least one:\n{listed}")
    if len(survey.faults) > LARGEST_SHARE_SKIPPED * total:
        raise InputError(
            f"{len(survey.faults)} of {total} clips cannot be used, more than the {LARGEST_SHARE_SKIPPED:.0%} that "
            f'on_error = "skip" leaves out:\n{listed}\nMend or remove them.'
        )


def leave_out_unencoded(config: DataConfig, survey: Survey, cache: Cache, inspector: Inspector) -> Survey:
    """The survey without the clips that are not whole in the cache; report and table are written anew where any is.

    Raises:
        InputError: as `take_survey`.
    """
    samples = SampleTable(survey.samples)
    reasons: dict[tuple[int, str], str] = {}
    for index in np.flatnonzero(~is_complete(samples, cache)):
        sample: Sample = samples[int(index)]
        fault = inspector.fault(sample.path) or (inspector.fault(sample.mask) if sample.mask else None)
        reasons[sample.source, sample.clip] = fault or "cannot be decoded; export it again"
    if not reasons:
        return survey
    rows = [json.loads(line) for line in survey.report.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if reason := reasons.get((row["source"], row["file"])):
            row.update(used=False, bucket=None, windows=[], captions=[], lost_area=None, reason=reason, fault=True)
    partial = survey.report.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, survey.report)
    faults = [f"{config.sources[source].title}/{name}: {reason}" for (source, name), reason in reasons.items()]
    smaller = Survey(
        report=survey.report,
        samples=survey.samples,
        used=survey.used - len(faults),
        passed_over=survey.passed_over,
        faults=[*survey.faults, *faults],
    )
    decide(config, smaller)
    kept = (sample for sample in samples if (sample.source, sample.clip) not in reasons)
    smaller.samples = write_samples(config.cache / "samples", kept)
    return smaller
