"""The page of `python -m data.check`: one HTML file that shows a data set as the training will see it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The page may show what it carries and may ask nobody for anything."""
THUMB = 128
"""Longest side of a thumbnail, in pixels."""
MOST_CHARACTERS = 300
"""Characters that are shown of a caption."""
MOST_ROWS = 2000
"""Clips that the page lists; the files beside it hold all of them."""

STYLE = """
:root { --ground: #f4f3ef; --sheet: #fff; --ink: #1c1b19; --soft: #66635b; --line: #dcd9d0; --bad: #a3261c;
  --warn: #8a5a00; --good: #1d6b43; }
@media (prefers-color-scheme: dark) { :root { --ground: #131312; --sheet: #1d1d1b; --ink: #f0eee8; --soft: #a5a197;
  --line: #34332f; --bad: #ff8f82; --warn: #e9b660; --good: #74d39c; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 6rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem; }
p { color: var(--soft); max-width: 46em; }
table { border-collapse: collapse; width: 100%; margin-top: .7rem; background: var(--sheet); font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.error { color: var(--bad); } .warning { color: var(--warn); } .ok { color: var(--good); }
.bar { height: .5rem; background: var(--good); border-radius: 3px; min-width: 2px; }
img { display: inline-block; border-radius: 4px; margin-right: 4px; image-rendering: auto; }
td.pictures, td.k { white-space: nowrap; }
td.name { min-width: 12rem; } td.level { white-space: nowrap; }
a { color: inherit; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipLine:
    """One clip on the page."""

    name: str
    bucket: str | None
    """None where it is left out."""
    windows: int
    reader: str | None
    lost_area: float | None
    captions: tuple[str, ...]
    reason: str | None
    pictures: tuple[NDArray[np.uint8], ...] = ()
    """Thumbnails [h, w, 3] of its first window, as the encoder sees it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketLine:
    """One bucket on the page."""

    name: str
    clips: int
    samples: int
    tokens: int


@dataclass(kw_only=True)
class CheckPage:
    """What the page shows."""

    title: str
    clips: list[ClipLine]
    buckets: list[BucketLine]
    findings: list[tuple[str, str, str]] = field(default_factory=list)
    """Level ("error" or "warning"), clip, message."""
    videos: list[tuple[str, str]] = field(default_factory=list)
    """File, beside the page, and clip of each window that was written as a video."""


def thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame [H, W, 3] with its longer side at most THUMB pixels."""
    image = Image.fromarray(frame)
    image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return np.asarray(image)


def render_page(page: CheckPage) -> str:
    """The page as HTML, pictures included."""
    used = [clip for clip in page.clips if clip.bucket is not None]
    left_out = [clip for clip in page.clips if clip.bucket is None]
    errors = sum(level == "error" for level, _, _ in page.findings) + len(left_out)
    state = f'<span class="error">{errors} to mend</span>' if errors else '<span class="ok">nothing to mend</span>'
    parts = [
        f"<h1>{escape(page.title)}</h1>",
        f"<p>{len(used)} clips used, {len(left_out)} left out; {state}; "
        f"{sum(level == 'warning' for level, _, _ in page.findings)} warnings.</p>",
        section(
            "Left out", "Each with its reason. Training stops at these unless told to skip them.", faults(left_out)
        ),
        section("Findings", "What a person should look at before training.", findings(page.findings)),
        section("Buckets", "Sizes in use. Tokens are what a step costs the denoiser.", buckets(page.buckets)),
        section(
            "Clips", "First, middle and last frame of each clip's first window, as the encoder sees it.", clips(used)
        ),
        section("Moving", "The first windows as videos, as the encoder sees them.", videos(page.videos)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(page.title)}</title>'
        f"<style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    return f"<h2>{title}</h2><p>{note}</p><div class=scroll>{body}</div>" if body else ""


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table, or nothing where there are no rows."""
    return f"<table><tr>{''.join(head)}</tr>{''.join(rows)}</table>" if rows else ""


def faults(left_out: Sequence[ClipLine]) -> str:
    rows = [
        f"<tr><td class=name>{escape(c.name)}<td class=error>{escape(c.reason or '')}</tr>"
        for c in left_out[:MOST_ROWS]
    ]
    return table(["<th>File", "<th>Why, and what to do"], rows)


def findings(found: Sequence[tuple[str, str, str]]) -> str:
    order = sorted(found, key=lambda one: one[0] != "error")
    rows = [
        f'<tr><td class="level {level}">{level}<td class=name>{escape(clip)}<td>{escape(message)}</tr>'
        for level, clip, message in order[:MOST_ROWS]
    ]
    return table(["<th>Level", "<th>Clip", "<th>What, and what to do"], rows)


def buckets(lines: Sequence[BucketLine]) -> str:
    most = max((line.samples for line in lines), default=1)
    rows = [
        f"<tr><td>{line.name}<td class=n>{line.tokens:,}<td class=n>{line.clips}<td class=n>{line.samples}"
        f'<td style="width:40%"><div class=bar style="width:{100 * line.samples / most:.1f}%"></div></tr>'
        for line in lines
    ]
    return table(["<th>Bucket", "<th class=n>Tokens", "<th class=n>Clips", "<th class=n>Windows", "<th>"], rows)


def clips(used: Sequence[ClipLine]) -> str:
    rows = [
        f"<tr><td class=pictures>{''.join(picture(p) for p in clip.pictures)}<td class=name>{escape(clip.name)}"
        f"<td class=k>{clip.bucket}<td class=n>{clip.windows}<td class=n>{100 * (clip.lost_area or 0):.0f} %"
        f"<td>{escape(clip.reader or '')}<td>{'<br>'.join(escape(shortened(c)) for c in clip.captions[:4])}</tr>"
        for clip in used[:MOST_ROWS]
    ]
    head = [
        "<th>",
        "<th>Clip",
        "<th>Bucket",
        "<th class=n>Windows",
        "<th class=n>Cropped",
        "<th>Reader",
        "<th>Captions",
    ]
    return table(head, rows)


def videos(written: Sequence[tuple[str, str]]) -> str:
    rows = [
        f'<tr><td class=name><a href="{escape(file)}">{escape(file)}</a><td>{escape(clip)}</tr>'
        for file, clip in written
    ]
    return table(["<th>File", "<th>Clip"], rows)


def shortened(caption: str) -> str:
    """A caption as the page shows it: one of a thousand words would hide the rest."""
    if len(caption) <= MOST_CHARACTERS:
        return caption
    return f"{caption[:MOST_CHARACTERS]}... ({len(caption):,} characters)"


def picture(pixels: NDArray[np.uint8]) -> str:
    """A frame [h, w, 3] as an image that lies inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    height, width = pixels.shape[:2]
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{width}" height="{height}" src="data:image/jpeg;base64,{data}">'
