"""The report: one HTML file that shows, rather than tells, whether the clips carry the brand's look.

Everything is inside the file, and its content security policy forbids it to ask any network for anything, so it can be
mailed and opened from a folder. A video that appears twice is stored once (`data-same` names the first).
"""

import base64
import hashlib
import html
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import InputError
from .report_chart import chart, number
from .report_page import CONTROLS, POLICY, SCRIPT, STYLE

NOTICEABLE = 0.03
"""Relative change from which a figure has moved; for figures that should stay, `TOLERATED`."""
TOLERATED = 0.15
"""Relative change up to which a figure that should stay counts as kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One prompt and seed, without and with the adapter."""

    prompt: str
    seed: int
    base: Path
    """MP4 (H.264) of the base model alone."""
    adapter: Path
    """MP4 with the adapter, same prompt and seed."""
    base_nearness: float | None = None
    """Distance to the brand, see `style.nearness`; lower is nearer."""
    adapter_nearness: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The training loss of one expert."""

    expert: str
    steps: list[int]
    loss: list[float]
    held_out: tuple[tuple[int, float], ...] = ()
    """Step and loss on clips that training never sees, at fixed noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number without and with the adapter."""

    name: str
    base: float | None
    adapter: float | None
    unit: str = ""
    better: Literal["lower", "higher", "same"] = "lower"
    """`lower` is for distances (nearer, farther), `higher` for merits (gained, lost), `same` for what should stay."""
    meaning: str = ""
    """One plain sentence for somebody who has never trained a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    title: str
    summary: str
    """The result in one sentence; it is the headline."""
    reference: list[Path] = field(default_factory=list)
    """A few of the brand's own clips."""
    panels: list[Panel] = field(default_factory=list)
    midway: list[Panel] = field(default_factory=list)
    """From a checkpoint half way; shown beside the final panel of the same prompt and seed."""
    curves: list[Curve] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


class Videos:
    """Writes `<video>` elements, each file's bytes once."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def element(self, path: Path, label: str) -> str:
        """A video with its bytes in it, or a pointer to the first element that has them."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"report: cannot read the clip {path}: {error.strerror}") from error
        digest = hashlib.sha256(content).hexdigest()
        named = f'aria-label="{text(label)}" title="{text(path.name)}" muted loop playsinline preload="auto" controls'
        if digest in self.seen:
            return f'<video {named} data-same="{self.seen[digest]}"></video>'
        self.seen[digest] = f"v{len(self.seen) + 1}"
        data = base64.b64encode(content).decode("ascii")
        return f'<video {named} id="{self.seen[digest]}" src="data:video/mp4;base64,{data}"></video>'


def text(value: str) -> str:
    """Escaped for element content and quoted attributes."""
    return html.escape(value.replace("\0", "�"), quote=True)


def without_folders(value: str) -> str:
    """Absolute paths in a text cut to their last name: a report travels, folders and user names stay."""
    return re.sub(r"(?<![\w.:/\\])(?:[A-Za-z]:[\\/]|~?/)(?:[^\s\"'<>,;|]*[\\/])?([^\s\"'<>,;|\\/]+)", r"\1", value)


def spoken(value: str) -> str:
    """A prompt in its own direction, marked as Chinese where it is, so that fonts choose the right glyphs."""
    chinese = re.search(r"[\u4e00-\u9fff]", value) and not re.search(r"[\u3040-\u30ff]", value)
    return f'<bdi dir="auto"{" lang=zh" if chinese else ""}>{text(value)}</bdi>'


def verdict(figure: Figure) -> tuple[str, str, str]:
    """Change in words a reader can trust: (change, word, "good" | "bad" | "even")."""
    base, adapter = figure.base, figure.adapter
    if base is None or adapter is None or not math.isfinite(base) or not math.isfinite(adapter):
        return "–", "not measured", "even"
    change = (adapter - base) / abs(base) if base else math.copysign(math.inf, adapter) if adapter else 0.0
    relative = figure.unit != "%" and math.isfinite(change)
    shown = (f"{change:+.0%}" if relative else f"{adapter - base:+.3g}").replace("-", "−")
    shown += " points" if figure.unit == "%" else ""
    if figure.better == "same":
        if abs(change) <= TOLERATED:
            return shown, "kept", "good"
        return shown, "lost" if change < 0 else "grown", "bad"
    if abs(change) < NOTICEABLE:
        return shown, "kept", "even"
    improved = (change < 0) == (figure.better == "lower")
    words = ("nearer", "farther") if figure.better == "lower" else ("gained", "lost")
    return shown, words[0] if improved else words[1], "good" if improved else "bad"


def meter(panel: Panel, farthest: float) -> str:
    """Both distances on one line that starts at the brand."""
    base, adapter = panel.base_nearness, panel.adapter_nearness
    if base is None or adapter is None or not math.isfinite(base) or not math.isfinite(adapter):
        return ""
    before, after = (100.0 * min(max(value / farthest, 0.0), 1.0) for value in (base, adapter))
    word = "unchanged" if abs(adapter - base) < 0.01 * abs(base) else "nearer" if adapter < base else "farther"
    label = f"Distance to the brand: {number(base)} before, {number(adapter)} with the adapter, {word}"
    left, width = min(before, after), abs(before - after)
    return (
        f'<div class="meter {word}" role="img" aria-label="{label}" title="{label}"><b>brand</b><i>'
        f'<s style="left:{left:.1f}%;width:{width:.1f}%"></s><u class="was" style="left:{before:.1f}%"></u>'
        f'<u class="is" style="left:{after:.1f}%"></u></i><em>{number(base)} → {number(adapter)}</em></div>'
    )


def card(panel: Panel, shots: list[tuple[str, Path, str]], videos: Videos, foot: str) -> str:
    """Clips of one prompt and seed side by side; shots are (caption, clip, class)."""
    figures = "".join(
        f'<figure class="{kind}">{videos.element(path, f"{name}: {panel.prompt}")}'
        f"<figcaption>{name}</figcaption></figure>"
        for name, path, kind in shots
    )
    head = f"<h3>{spoken(panel.prompt)}<small>seed {panel.seed}</small></h3>"
    return f'<article class="card"><div class="shots n{len(shots)}">{figures}</div>{head}{foot}</article>\n'


def progress(report: Report, videos: Videos) -> Iterator[str]:
    """Before, half way and finished, for each midway panel; without the last where no final panel matches."""
    finals = {(panel.prompt, panel.seed): panel for panel in report.panels}
    for panel in report.midway:
        shots = [("Before", panel.base, "was"), ("Half way", panel.adapter, "mid")]
        final = finals.get((panel.prompt, panel.seed))
        steps = [panel.base_nearness, panel.adapter_nearness]
        if final:
            shots.append(("Finished", final.adapter, "is"))
            steps.append(final.adapter_nearness)
        known = all(step is not None for step in steps)
        foot = f'<p class="path">distance to the brand {" → ".join(map(number, steps))}</p>' if known else ""
        yield card(panel, shots, videos, foot)


def table(figures: list[Figure]) -> str:
    """Figures: base, adapter, change, and a word."""
    rows = []
    for figure in figures:
        change, word, kind = verdict(figure)
        rows.append(
            f'<tr><th scope="row">{text(figure.name)}<small>{text(figure.meaning)}</small></th>'
            f'<td data-of="Base">{number(figure.base, figure.unit)}</td>'
            f'<td data-of="Adapter">{number(figure.adapter, figure.unit)}</td>'
            f'<td data-of="Change">{change}</td><td><span class="word {kind}">{word}</span></td></tr>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "Base", "Adapter", "Change", "In a word"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def section(title: str, note: str, body: str) -> str:
    """A titled part of the page; nothing where there is nothing to show."""
    return f"<section><h2>{title}</h2><p class=note>{note}</p>{body}</section>\n" if body else ""


def page(report: Report) -> Iterator[str]:
    """The document, piece by piece."""
    videos = Videos()
    pairs = [(panel.base_nearness, panel.adapter_nearness) for panel in report.panels]
    known = [(b, a) for b, a in pairs if b is not None and a is not None and math.isfinite(b + a)]
    farthest = max(1e-9, *itertools.chain.from_iterable(known), 0.0)
    nearer = sum(after < before for before, after in known)
    tally = f"<p class=tally><b>{nearer} of {len(known)}</b> clips moved nearer to the brand.</p>" if known else ""

    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
    yield f"<title>{text(report.title)}</title><style>{STYLE}</style></head>\n<body><main>"
    yield f"<header><p class=title>{spoken(report.title)}</p>"
    # A number and its per cent sign stay on one line.
    headline = without_folders(report.summary).replace(" %", "\u00a0%")
    yield f"<h1>{spoken(headline)}</h1>{tally}</header>\n"

    strip = "".join(f"<figure>{videos.element(path, 'A clip of the brand')}</figure>" for path in report.reference)
    yield section("The brand", "What the adapter learned from.", strip and f'<div class="shots strip">{strip}</div>')

    cards = "".join(
        card(
            panel,
            [("Before", panel.base, "was"), ("With the adapter", panel.adapter, "is")],
            videos,
            meter(panel, farthest),
        )
        for panel in report.panels
    )
    note = "Same prompt, same seed: the model alone, and with the adapter."
    yield section("Before and after", note, cards and f"<div class=grid>{cards}</div>")
    cards = "".join(progress(report, videos))
    note = "The same prompt and seed while training went on."
    yield section("How the look arrived", note, cards and f"<div class=grid>{cards}</div>")

    note = "Over all clips above. The last column says it in a word."
    yield section("In figures", note, table(report.figures) if report.figures else "")
    charts = "".join(
        chart(curve.expert, curve.steps, curve.loss, i, curve.held_out) for i, curve in enumerate(report.curves)
    )
    note = "Wan2.2 has two experts, and each learned an adapter of its own. Lower is better."
    yield section("Training", note, charts and f"<div class=charts>{charts}</div>")
    facts = "".join(f"<dt>{text(k)}</dt><dd>{spoken(without_folders(v))}</dd>" for k, v in report.facts.items())
    yield f"<details><summary>Settings</summary><dl>{facts}</dl></details>\n" if facts else ""
    yield CONTROLS if videos.seen else ""
    yield f"</main><script>{SCRIPT}</script></body></html>\n"


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file, whole or not at all.

    Raises InputError where a clip cannot be read, and ValueError where a curve's steps and losses differ in number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A prompt cut in the middle of a character must cost that character, not the report.
        with draft.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(page(report))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
