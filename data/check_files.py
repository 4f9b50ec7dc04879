"""What `python -m data.check` found out, and the files that it writes for a person to look at."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .buckets import Bucket
from .check_page import BucketLine, CheckPage, ClipLine, render_page
from .clips import Clip, Row
from .lint import LintInput

SHEET_CLIPS = 24
"""Clips on a contact sheet."""
MOST_PICTURES = 500
"""Clips whose pictures the page carries; the sheets hold all of them."""


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
    videos: list[tuple[str, str]] = field(default_factory=list)
    """File, below the folder, and clip of the windows that were written as videos."""
    files: dict[Path, Clip] = field(default_factory=dict)
    """Files that have been looked at, and the first clip of each."""
    contents: dict[str, Clip] = field(default_factory=dict)
    """The first clip of each content, by its hash."""
    compared: set[tuple[int, str]] = field(default_factory=set)
    """Sources and contents that have been compared with those of an earlier source."""
    linted: set[tuple[Path, str]] = field(default_factory=set)
    """Files and captions that have been handed to the lint."""
    sheet: list[NDArray[np.uint8]] = field(default_factory=list)
    """Pictures for the contact sheet that is being filled."""

    @property
    def unusable(self) -> int:
        """Clips that training would leave out for a fault."""
        return sum(row.fault for row in self.rows)


def line_of(row: Row, label: str, pictures: tuple[NDArray[np.uint8], ...] = ()) -> ClipLine:
    """A report's line as the page shows it."""
    return ClipLine(
        name=label,
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


def write_files(check: Check, title: str, out: Path) -> None:
    """The report's lines, the findings and the page."""
    page = CheckPage(
        title=title,
        clips=check.lines,
        buckets=bucket_lines(check.rows),
        findings=check.findings,
        videos=check.videos,
    )
    (out / "data_report.jsonl").write_text("".join(row.to_json() + "\n" for row in check.rows), encoding="utf-8")
    (out / "findings.json").write_text(
        json.dumps([dict(zip(("level", "clip", "message"), f, strict=True)) for f in check.findings], indent=1),
        encoding="utf-8",
    )
    (out / "report.html").write_text(render_page(page), encoding="utf-8")
