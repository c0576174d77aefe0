"""Curves as SVG, for reports that need nothing but a browser."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 280  # pixels of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 34  # pixels around the curves
_COLORS = ("#1f6feb", "#d1495b", "#2a9d5c", "#b7791f", "#7b4fbf", "#0f8b8d", "#6b7280", "#c2410c")
_MOST_POINTS = 600  # of a drawn curve; longer ones are averaged


Place = Callable[[float, float], tuple[float, float]]
"""(step, value) -> pixels."""


@dataclass(frozen=True)
class Curve:
    """`values` over `steps`, both of one length, called `label`. `smooth`: draw a moving average over the points."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    smooth: bool = False


def chart(title: str, curves: Sequence[Curve]) -> str:
    """Curves over the steps as an `<svg>` element; "" if there is nothing to draw."""
    curves = [curve for curve in curves if curve.steps]
    if not curves:
        return ""
    last = max(1, *(max(curve.steps) for curve in curves))
    low, high = _range([value for curve in curves for value in _trimmed(curve)])

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + step / last * (WIDTH - _LEFT - _RIGHT)
        share = (min(max(value, low), high) - low) / (high - low)
        return x, HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for number in range(5):
        value = low + (high - low) * number / 4
        _, y = place(0, value)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        step = round(last * number / 4)
        x, _ = place(step, low)
        anchor = "end" if number == 4 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="{anchor}">{step}</text>')
    for number, curve in enumerate(curves):
        color = _COLORS[number % len(_COLORS)]
        if curve.smooth:
            parts.append(_line(curve.steps, curve.values, place, color, "raw"))
        values = _smoothed(curve.values) if curve.smooth else curve.values
        parts.append(_line(curve.steps, values, place, color, "curve"))
    parts.append("</svg>")
    keys = (
        ""
        if len(curves) == 1 and curves[0].label == title
        else "".join(
            f'<span><i style="background:{_COLORS[number % len(_COLORS)]}"></i>{html.escape(curve.label)}</span>'
            for number, curve in enumerate(curves)
        )
    )
    return f'<figure><figcaption>{html.escape(title)}</figcaption>{"".join(parts)}<p class="key">{keys}</p></figure>'


def _line(steps: Sequence[float], values: Sequence[float], place: Place, color: str, style: str) -> str:
    steps, values = _thinned(steps, values)
    if len(steps) == 1:
        x, y = place(steps[0], values[0])
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, steps, values))
    return f'<polyline points="{points}" stroke="{color}" class="{style}"/>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)


def _trimmed(curve: Curve) -> Sequence[float]:
    """The values that set the scale: without the largest and smallest hundredth, which would flatten the rest."""
    ordered = sorted(curve.values)
    cut = len(ordered) // 100
    return ordered[cut : len(ordered) - cut] if curve.smooth else ordered


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a twentieth of the points, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total, weight, result = 0.0, 0.0, list[float]()
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    size = math.ceil(len(steps) / _MOST_POINTS)
    if size < 2:
        return steps, values
    groups = range(0, len(steps), size)
    return (
        [sum(steps[at : at + size]) / len(steps[at : at + size]) for at in groups],
        [sum(values[at : at + size]) / len(values[at : at + size]) for at in groups],
    )
