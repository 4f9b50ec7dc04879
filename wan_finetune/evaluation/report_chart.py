"""Loss curves as SVG, drawn by hand so that the report needs no library and no network."""

import html
import itertools
import math
from collections.abc import Sequence

SMOOTHING = 0.06
"""Share of the curve's length over which the loss is averaged."""
MAX_POINTS = 600
"""Points drawn per curve; a screen shows no more."""
CHART = (520, 260, 46, 24, 34, 14)
"""Width, height and the margins left, right, bottom, top of a loss curve."""


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits and the unit; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}{' ' if unit and unit != '%' else ''}{html.escape(unit)}"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round values inside the range."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(
    expert: str, steps: list[int], loss: list[float], place: int, held_out: Sequence[tuple[int, float]] = ()
) -> str:
    """One expert's loss as SVG: every step faint, the running mean bold, (step, held-out loss) dashed."""
    points = [(s, v) for s, v in zip(steps, loss, strict=True) if math.isfinite(v)]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    width, height, left, right, bottom, top = CHART
    reach = max(1, round(SMOOTHING * len(points)))
    values = [value for _, value in points]
    # A centred mean, shorter at the ends, starts where the curve starts and lags behind nothing.
    total = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    mean = [(total[end] - total[start]) / (end - start) for start, end in spans]
    ranked = sorted(values)
    others = [value for step, value in held_out if step >= points[0][0] and math.isfinite(value)]
    low = min(ranked[len(ranked) // 50], *mean, *others)
    high = max(ranked[-1 - len(ranked) // 50], *mean, *others)
    pad = 0.08 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - pad, high + pad
    first, last = points[0][0], points[-1][0]

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (width - left - right)

    def y(value: float) -> float:
        return top + (high - min(max(value, low), high)) / (high - low) * (height - top - bottom)

    every = max(1, len(points) // MAX_POINTS)
    places = [x(step) for step, _ in points]
    raw, smooth = (
        " ".join(f"{place:.1f},{y(v):.1f}" for place, v in zip(places[::every], row[::every], strict=True))
        for row in (values, mean)
    )
    seen = [(x(step), y(value)) for step, value in held_out if step >= first and math.isfinite(value)]
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in seen)
    dashes = f'<polyline class="held" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in seen)}"/>{dots}' if seen else ""
    key = '<span class="key held">clips that training never sees</span>' if seen else ""
    across = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>'
        for v in ticks(low, high)
    )
    along = "".join(
        f'<text x="{x(s):.1f}" y="{height - 14}" text-anchor="middle">{s:g}</text>'
        for s in ticks(first, last)
        if s == int(s) and x(s) > left + 40
    )
    label = f"Loss of the {expert} expert over {last} steps, from {number(mean[0])} to {number(mean[-1])}"
    return (
        f'<figure class="chart c{place % 2}"><figcaption><strong>{html.escape(expert)}</strong>'
        f'<span class="key">running mean</span><span class="key raw">each step</span>'
        f"{key}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
        f'<g class="axis">{across}{along}<text x="{left}" y="{height - 14}" text-anchor="middle">steps</text></g>'
        f'<polyline class="raw" points="{raw}"/><polyline class="mean" points="{smooth}"/>{dashes}</svg></figure>'
    )
