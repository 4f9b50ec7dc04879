"""A data set looked at before training: every clip decoded and judged, and what there is to see written to files."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from wan_finetune.settings import Settings
from wan_finetune.video import VideoFault, write_video

from .borders import find_borders
from .check_files import MOST_PICTURES, SHEET_CLIPS, Check, line_of, write_files, write_sheet
from .check_page import thumbnail
from .clips import Clip, Row, find_clips, trigger_of
from .config import DataConfig
from .inspection import Inspector
from .likeness import duplicates, fingerprint
from .lint import LintInput, lint
from .quality import find_end_card, is_black, is_flat, is_frozen, static_corners
from .sources import is_listed, read_source
from .viewing import window_frames

LOOKED_AT = 12
"""Frames of a clip, evenly spread, by which it is judged."""
SANITY_CLIPS = 8
"""Windows that are written as videos, as the encoder sees them."""


class BaseName(Settings):
    """Of the [model] table, what tells which tokenizer counts."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    base: str = ""
    revision: str | None = None


class CheckConfig(Settings):
    """The tables of a run's configuration that concern its data."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: DataConfig
    model: BaseName = BaseName()


def source_names(config: DataConfig) -> list[str]:
    """What stands before a clip's name to tell the sources apart: nothing where there is only one."""
    if len(config.sources) == 1:
        return [""]
    names = [source.dataset or (source.path.name if source.path else "") for source in config.sources]
    return [
        f"{name}/" if name and names.count(name) == 1 else f"source {number}: {name}/"
        for number, name in enumerate(names, start=1)
    ]


def count_items(config: DataConfig) -> int | None:
    """How many files the sources name; None where only reading them through tells, or shots are counted.

    Raises:
        InputError: a whole source is unusable.
    """
    if any(source.shots or not is_listed(source) for source in config.sources):
        return None
    return sum(1 for source in config.sources for _ in read_source(source, config.cache / "media"))


def run_check(
    config: CheckConfig,
    out: Path,
    inspector: Inspector,
    count_tokens: Callable[[str], int] | None,
    progress: Callable[[str], None],
) -> Check:
    """Look at every clip of every source, and write what there is to see into `out`.

    Raises:
        InputError: a whole source is unusable.
    """
    check = Check()
    names = source_names(config.data)
    for row, clip in find_clips(config.data, inspector):
        label = names[row.source] + row.file
        if clip is not None:
            row = look_at(check, config.data, clip, row, label, inspector, out)
            if row.used:
                compare_sources(check, config.data, clip, label, names)
                add_captions(check, config.data, clip, label, count_tokens)
                check.files.setdefault(clip.path, clip)
        else:
            check.lines.append(line_of(row, label))
        check.rows.append(row)
        progress(label)
    write_sheet(check, out)
    for finding in lint(check.captions, config.data.trigger):
        check.findings.append((finding.level, finding.clip or "the set", finding.message))
    labels = [name for name, _ in check.prints]
    for group in duplicates([found for _, found in check.prints]):
        others = ", ".join(labels[index] for index in group[1:])
        check.findings.append(("warning", labels[group[0]], f"shows the same as {others}; keep one of them"))
    write_files(check, config.data.trigger or "Data check", out)
    return check


def look_at(check: Check, config: DataConfig, clip: Clip, row: Row, label: str, inspector: Inspector, out: Path) -> Row:
    """Decode a clip and judge what it shows; the row says so where it cannot be decoded."""
    source = config.sources[clip.source]
    once = clip.path not in check.files
    # Shots of one file are each looked at; a file that another source has named is not judged again.
    again = not once and check.files[clip.path].source != clip.source
    try:
        info = inspector.info(clip.path)
        window = window_frames(clip, clip.start_seconds[0], config.fps, inspector)
        first, last = np.searchsorted(info.pts_seconds, (clip.span.start_seconds, clip.span.end_seconds))
        frames = inspector.read(
            info, np.unique(np.linspace(first, max(first, last - 1), LOOKED_AT).round().astype(int))
        )
        whole = once and not info.is_still
        end = find_end_card(info, inspector.read) if whole and not source.cut_end_card else None
        shots = inspector.shots(info) if whole and not source.shots else ()
    except VideoFault as fault:
        left_out = Row(file=row.file, source=row.source, used=False, reader=row.reader, reason=fault.reason, fault=True)
        check.lines.append(line_of(left_out, label))
        return left_out
    pictures = tuple(thumbnail(window[i]) for i in sorted({0, len(window) // 2, len(window) - 1}))
    check.lines.append(line_of(row, label, pictures if len(check.lines) < MOST_PICTURES else ()))
    if not again:
        # The end card is a shot of its own, and has its own line.
        cuts = sum(1 for shot in shots[1:] if end is None or shot.start_seconds < end)
        bars = find_borders(frames) is not None and not source.crop_borders and not info.is_still
        check.findings += [("warning", label, message) for message in judge(frames, cuts, end, bars)]
        check.prints.append((label, fingerprint(frames)))
    if clip.still and not info.is_still and any(b.num_frames > 1 for b in config.buckets_of(source)):
        check.findings.append(
            (
                "warning",
                label,
                f"is a video that fills no bucket but {clip.bucket}, and trains as a still, without motion; use a "
                "longer or larger clip, or add a bucket of fewer frames",
            )
        )
    check.sheet += pictures[:1]
    if len(check.sheet) == SHEET_CLIPS:
        write_sheet(check, out)
    if len(check.videos) < SANITY_CLIPS and not clip.still:
        file = f"clips/{len(check.videos) + 1:02d}.mp4"
        (out / "clips").mkdir(parents=True, exist_ok=True)
        write_video(out / file, window, config.fps)
        check.videos.append((file, label))
    return row


def compare_sources(check: Check, config: DataConfig, clip: Clip, label: str, names: list[str]) -> None:
    """Say where an earlier source has the same file, or a copy of it, and means something else by it."""
    earlier = check.contents.setdefault(clip.sha256, clip)
    if earlier.source == clip.source or (clip.source, clip.sha256) in check.compared:
        return
    check.compared.add((clip.source, clip.sha256))
    other = names[earlier.source] + earlier.name
    if config.sources[earlier.source].regularisation != config.sources[clip.source].regularisation:
        message = (
            f"is the same clip as {other}, and only one of the two sources is a regularisation set: it would be learnt "
            "and held off at once; remove it from one of them"
        )
        check.findings.append(("error", label, message))
    elif set(earlier.written) != set(clip.written):
        message = f"is the same clip as {other}, with another caption; keep one, or write both beside one of them"
        check.findings.append(("warning", label, message))


def judge(frames: NDArray[np.uint8], num_cuts: int, end_card_seconds: float | None, bars: bool) -> list[str]:
    """What a person should look at in a clip."""
    found = []
    if is_black(frames):
        return ["is black throughout; remove it"]
    if is_flat(frames):
        found.append("has one colour throughout; remove it")
    elif is_frozen(frames):
        found.append("does not move; export it as a still, or remove it")
    if corners := static_corners(frames):
        where = " and ".join(corners)
        found.append(f"the {where} corner stays the same, as a watermark does, and would be learnt; crop or remove it")
    if bars:
        found.append("has black bars, which would be learnt; set crop_borders = true for its source")
    if num_cuts:
        found.append(f"holds {num_cuts + 1} shots, and a window may run across a cut; set shots = true for its source")
    if end_card_seconds is not None:
        found.append(
            f"ends in a still picture from {end_card_seconds:.2f} s on; set cut_end_card = true for its source"
        )
    return found


def add_captions(
    check: Check, config: DataConfig, clip: Clip, label: str, count_tokens: Callable[[str], int] | None
) -> None:
    """Hand the captions of a file to the lint, each once however many shots or sources have it."""
    source = config.sources[clip.source]
    pairs = zip(clip.written, clip.captions, strict=True)
    new = [(written, orders) for written, orders in pairs if (clip.path, orders[0]) not in check.linted]
    check.linted.update((clip.path, orders[0]) for _, orders in new)
    for written, orders in new:
        check.captions.append(
            LintInput(
                clip=label,
                written=written,
                composed=orders[0],
                num_tokens=count_tokens(orders[0]) if count_tokens else None,
                trigger=trigger_of(source, config),
                regularisation=source.regularisation,
            )
        )


def token_counter(model: BaseName) -> Callable[[str], int] | None:
    """Counts a caption's tokens as the base does; None where its tokenizer cannot be had."""
    from tokenizers import Tokenizer

    from wan_finetune.experts import base_folder

    try:
        file = base_folder(model.base, ["tokenizer"], model.revision) / "tokenizer" / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # told, and everything else is still checked
        print(f"warning: captions are not counted in tokens: {error}", file=sys.stderr)
        return None
    return lambda text: len(tokenizer.encode(text).ids)
