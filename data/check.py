"""`python -m data.check --config C [section.key=value ...]`: every clip looked at, before anything is trained."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from wan_finetune.errors import InputError
from wan_finetune.settings import Settings, load_settings
from wan_finetune.video import VideoFault, write_video

from .buckets import Bucket
from .check_page import BucketLine, CheckPage, ClipLine, render_page, thumbnail
from .clips import Clip, Row, find_clips, trigger_of
from .config import DataConfig
from .inspection import Inspector
from .likeness import duplicates, fingerprint
from .lint import LintInput, lint
from .quality import find_end_card, is_black, is_flat, is_frozen, static_corners
from .viewing import window_frames

LOOKED_AT = 12
"""Frames of a clip, evenly spread, by which it is judged."""
SANITY_CLIPS = 8
"""Windows that are written as videos, as the encoder sees them."""
SHEET_CLIPS = 24
"""Clips on a contact sheet."""
MOST_PICTURES = 500
"""Clips whose pictures the page carries; the sheets hold all of them."""


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


@dataclass(kw_only=True)
class Check:
    """What was found out about a data set."""

    lines: list[ClipLine] = field(default_factory=list)
    findings: list[tuple[str, str, str]] = field(default_factory=list)
    """Level ("error" or "warning"), clip, message."""
    rows: list[Row] = field(default_factory=list)
    captions: list[LintInput] = field(default_factory=list)
    prints: list[tuple[str, bytes]] = field(default_factory=list)
    """Name and perceptual fingerprint of each clip."""
    files: set[Path] = field(default_factory=set)
    """Files of which a shot has been looked at."""
    sheet: list[NDArray[np.uint8]] = field(default_factory=list)
    """Pictures for the contact sheet that is being filled."""

    @property
    def unusable(self) -> int:
        """Clips that training would leave out for a fault."""
        return sum(row.fault for row in self.rows)


def run_check(
    config: CheckConfig, out: Path, count_tokens: Callable[[str], int] | None, progress: Callable[[str], None]
) -> Check:
    """Look at every clip of every source, and write what there is to see into `out`.

    Raises:
        InputError: a whole source is unusable.
    """
    check = Check()
    with Inspector(config.data.cache, config.data.decode_timeout_seconds) as inspector:
        for row, clip in find_clips(config.data, inspector):
            progress(row.file)
            if clip is not None:
                row = look_at(check, config.data, clip, row, inspector, out)
                if row.used and clip.path not in check.files:
                    add_captions(check, config.data, clip, count_tokens)
                check.files.add(clip.path)
            else:
                check.lines.append(line_of(row))
            check.rows.append(row)
    write_sheet(check, out)
    for finding in lint(check.captions, config.data.trigger):
        check.findings.append((finding.level, finding.clip or "the set", finding.message))
    names = [name for name, _ in check.prints]
    for group in duplicates([found for _, found in check.prints]):
        alike = ", ".join(names[index] for index in group)
        check.findings.append(("warning", names[group[0]], f"shows the same as others: {alike}; keep one of them"))
    write_files(check, config, out)
    return check


def look_at(check: Check, config: DataConfig, clip: Clip, row: Row, inspector: Inspector, out: Path) -> Row:
    """Decode a clip and judge what it shows; the row says so where it cannot be decoded."""
    try:
        info = inspector.info(clip.path)
        window = window_frames(clip, clip.start_seconds[0], config.fps, inspector)
        first, last = np.searchsorted(info.pts_seconds, (clip.span.start_seconds, clip.span.end_seconds))
        frames = inspector.read(
            info, np.unique(np.linspace(first, max(first, last - 1), LOOKED_AT).round().astype(int))
        )
        source = config.sources[clip.source]
        once = not clip.still and clip.path not in check.files
        end = find_end_card(info, inspector.read) if once and not source.cut_end_card else None
        shots = inspector.shots(info) if once and not source.shots else ()
    except VideoFault as fault:
        left_out = Row(file=row.file, source=row.source, used=False, reader=row.reader, reason=fault.reason, fault=True)
        check.lines.append(line_of(left_out))
        return left_out
    pictures = tuple(thumbnail(window[i]) for i in sorted({0, len(window) // 2, len(window) - 1}))
    check.lines.append(line_of(row, pictures if len(check.lines) < MOST_PICTURES else ()))
    check.findings += [("warning", clip.name, message) for message in judge(frames, len(shots), end)]
    check.prints.append((clip.name, fingerprint(frames)))
    check.sheet += pictures[:1]
    if len(check.sheet) == SHEET_CLIPS:
        write_sheet(check, out)
    if len(check.prints) <= SANITY_CLIPS and not clip.still:
        (out / "clips").mkdir(parents=True, exist_ok=True)
        write_video(out / "clips" / f"{len(check.prints):02d}.mp4", window, config.fps)
    return row


def judge(frames: NDArray[np.uint8], num_shots: int, end_card_seconds: float | None) -> list[str]:
    """What a person should look at in a clip."""
    found = []
    if is_black(frames):
        found.append("is black throughout; remove it")
    elif is_flat(frames):
        found.append("has one colour throughout; remove it")
    elif is_frozen(frames):
        found.append("does not move; export it as a still, or remove it")
    if corners := static_corners(frames):
        where = " and ".join(corners)
        found.append(f"the {where} corner stays the same, as a watermark does, and would be learnt; crop or remove it")
    if num_shots > 1:
        found.append(f"holds {num_shots} shots, and a window may run across a cut; set shots = true for its source")
    if end_card_seconds is not None:
        found.append(
            f"ends in a still picture from {end_card_seconds:.2f} s on; set cut_end_card = true for its source"
        )
    return found


def add_captions(check: Check, config: DataConfig, clip: Clip, count_tokens: Callable[[str], int] | None) -> None:
    """Hand a clip's captions to the lint."""
    source = config.sources[clip.source]
    for written, orders in zip(clip.written, clip.captions, strict=True):
        check.captions.append(
            LintInput(
                clip=clip.name,
                written=written,
                composed=orders[0],
                num_tokens=count_tokens(orders[0]) if count_tokens else None,
                trigger=trigger_of(source, config),
                regularisation=source.regularisation,
            )
        )


def line_of(row: Row, pictures: tuple[NDArray[np.uint8], ...] = ()) -> ClipLine:
    """A report's line as the page shows it."""
    return ClipLine(
        name=row.file,
        bucket=row.bucket,
        windows=len(row.windows),
        reader=row.reader,
        lost_area=row.lost_area,
        captions=row.captions,
        reason=row.reason,
        pictures=pictures,
    )


def bucket_lines(rows: list[Row]) -> list[BucketLine]:
    """Clips and windows of each bucket, the fullest first."""
    used = [row for row in rows if row.bucket is not None]
    lines = []
    for name in dict.fromkeys(row.bucket for row in used if row.bucket is not None):
        own = [row for row in used if row.bucket == name]
        samples = sum(len(row.windows) for row in own)
        lines.append(BucketLine(name=name, clips=len(own), samples=samples, tokens=Bucket.parse(name).tokens))
    return sorted(lines, key=lambda line: -line.samples)


def write_sheet(check: Check, out: Path) -> None:
    """One contact sheet of the pictures gathered so far."""
    from PIL import Image

    if not check.sheet:
        return
    folder = out / "sheets"
    folder.mkdir(parents=True, exist_ok=True)
    width, height = (max(picture.shape[side] for picture in check.sheet) for side in (1, 0))
    columns = 6
    sheet = Image.new("RGB", (columns * width, -(-len(check.sheet) // columns) * height), "white")
    for index, picture in enumerate(check.sheet):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    sheet.save(folder / f"{len(list(folder.glob('*.png'))):03d}.png")
    check.sheet.clear()


def write_files(check: Check, config: CheckConfig, out: Path) -> None:
    """The report's lines, the findings and the page."""
    page = CheckPage(
        title=config.data.trigger or "Data check",
        clips=check.lines,
        buckets=bucket_lines(check.rows),
        findings=check.findings,
    )
    (out / "data_report.jsonl").write_text("".join(row.to_json() + "\n" for row in check.rows), encoding="utf-8")
    (out / "findings.json").write_text(
        json.dumps([dict(zip(("level", "clip", "message"), f, strict=True)) for f in check.findings], indent=1),
        encoding="utf-8",
    )
    (out / "report.html").write_text(render_page(page), encoding="utf-8")


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


def main() -> int:
    """Check and say what was found; 0 when all clips can be used, 1 when one cannot, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description="Look at every clip of a configuration before training."
    )
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as configs/pocket.toml")
    parser.add_argument("--out", type=Path, default=Path("data_check"), help="folder for the page and the pictures")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file, values in TOML")
    arguments = parser.parse_args()
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    try:
        config = load_settings(CheckConfig, arguments.config, arguments.overrides)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for old in (arguments.out / "sheets").glob("*.png"):
            old.unlink()
        with console.status("looking at the clips") as status:
            seen = iter(range(1, 2**62))
            check = run_check(
                config,
                arguments.out,
                token_counter(config.model) if config.model.base else None,
                lambda name: status.update(f"clip {next(seen)}: {name}"),
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        print(
            json.dumps({"clips": [asdict(row) for row in check.rows], "findings": check.findings}, ensure_ascii=False)
        )
    else:
        tell(check, arguments.out)
    return 1 if check.unusable else 0


def tell(check: Check, out: Path) -> None:
    """The result at the terminal."""
    for row in check.rows:
        if not row.used:
            print(f"{'left out' if row.fault else 'passed over'}: {row.file}: {row.reason}")
    for level, clip, message in check.findings:
        print(f"{level}: {clip}: {message}")
    for line in bucket_lines(check.rows):
        print(f"{line.name}: {line.clips} clips, {line.samples} windows, {line.tokens:,} tokens each")
    print(f"{len(check.rows) - check.unusable} clips can be used, {check.unusable} cannot; {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
