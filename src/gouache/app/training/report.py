"""A run, or several beside each other, as one HTML file: curves, samples, settings, what changed. It loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gouache.app.training import folder as run_folder
from gouache.app.training.charts import Curve, chart
from gouache.app.training.folder import RunFolder
from gouache.app.training.status import Status, status
from gouache.errors import RequestError, printable
from gouache.images import pixels

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
figure { display: inline-block; width: min(100%, 34rem); margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
.grid { stroke: #8884; } .curve, .raw { fill: none; stroke-width: 1.8; } .raw { opacity: .25; stroke-width: 1; }
.key span { margin-right: 1rem; } .key i { display: inline-block; width: 1em; height: .25em; margin-right: .4em;
vertical-align: middle; } table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
vertical-align: top; } .samples img { max-width: 12rem; margin: 0 .3rem .3rem 0; } .note { color: #b45309; }
"""
_SIDE = 384  # pixels: samples are shown no larger
_MOST_MOMENTS = 8  # of samples that are shown


def report(runs: Sequence[RunFolder]) -> str:
    """The page. Raises GouacheError if a run's settings cannot be read."""
    names = _names(runs)
    states = {name: status(run) for name, run in zip(names, runs)}
    logs = {name: run.log() for name, run in zip(names, runs)}
    settings = {name: dict(_flat(run.settings().model_dump(mode="json"))) for name, run in zip(names, runs)}
    title = f"Training of {', '.join(names)}"
    body = [
        f"<h1>{_text(title)}</h1>",
        *(_summary(name, each) for name, each in states.items()),
        "<h2>Curves</h2>",
        *_curves(logs),
        "<h2>Samples</h2>",
        *(_samples(name, run, len(runs) > 1) for name, run in zip(names, runs)),
        "<h2>Settings</h2>",
        _settings(settings),
        *_changes(states),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>{"".join(body)}</html>\n'
    )


def _names(runs: Sequence[RunFolder]) -> list[str]:
    names = [run.path.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs)]


def _summary(name: str, state: Status) -> str:
    lines = "".join(f"<li>{_text(line)}</li>" for line in state.lines())
    remarks = "".join(f'<li class="note">{_text(remark)}</li>' for remark in state.remarks)
    return f"<h2>{_text(name)}</h2><ul>{lines}{remarks}</ul>"


def _curves(logs: Mapping[str, list[Mapping[str, float]]]) -> Iterator[str]:
    """One chart per measurement, with a curve for each run; the parts of the validation loss in one chart per run."""
    several = len(logs) > 1
    measured = {name: None for lines in logs.values() for line in lines for name in line if name != "step"}
    grouped = [name for name in measured if name.startswith("validation loss at ")]
    for measurement in [name for name in measured if name not in grouped]:
        curves = [
            Curve(name if several else measurement, *run_folder.curve(lines, measurement), smooth=measurement == "loss")
            for name, lines in logs.items()
        ]
        yield chart(measurement, curves)
    for name, lines in logs.items():
        parts = [Curve(part.removeprefix("validation loss at "), *run_folder.curve(lines, part)) for part in grouped]
        yield chart(f"validation loss by timestep{f', {name}' if several else ''}", parts)


def _samples(name: str, run: RunFolder, titled: bool) -> str:
    moments: dict[str, list[Path]] = {}
    if run.samples.is_dir():
        for path in sorted(run.samples.glob("step-*-*.png")):
            moments.setdefault(path.name[5:13], []).append(path)
    chosen = list(moments)
    if len(chosen) > _MOST_MOMENTS:
        last = len(chosen) - 1
        chosen = [chosen[round(index * last / (_MOST_MOMENTS - 1))] for index in range(_MOST_MOMENTS)]
    rows = "".join(
        f"<tr><th>step {int(moment)}</th><td class='samples'>{''.join(map(_picture, moments[moment]))}</td></tr>"
        for moment in chosen
    )
    head = f"<h3>{_text(name)}</h3>" if titled else ""
    return head + (f"<table>{rows}</table>" if rows else "<p>There are none.</p>")


def _picture(path: Path) -> str:
    try:
        picture = pixels.read(path, "samples").convert("RGB")
    except RequestError:
        return ""
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_text(path.name)}" src="data:image/jpeg;base64,{data}">'


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Every setting; of several runs, those that differ."""
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    if len(settings) > 1:
        keys = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
        if not keys:
            return "<p>They are equal.</p>"
    head = "".join(f"<th>{_text(name)}</th>" for name in settings)
    rows = "".join(
        f"<tr><th>{_text(key)}</th>{''.join(f'<td>{_text(values.get(key))}</td>' for values in settings.values())}</tr>"
        for key in keys
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _changes(states: Mapping[str, Status]) -> Iterator[str]:
    for name, state in states.items():
        if state.changes:
            lines = "".join(f"<li>{_text(change)}</li>" for change in state.changes)
            yield f"<h2>Changed while training{f', {_text(name)}' if len(states) > 1 else ''}</h2><ul>{lines}</ul>"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _text(value: object) -> str:
    return html.escape(printable("" if value is None else str(value), 400))
