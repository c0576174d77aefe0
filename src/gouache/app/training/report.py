"""A run, or several beside each other, as one HTML file: curves, samples, settings, what changed. It loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gouache.app.training.charts import Curve, chart
from gouache.app.training.export import find_step
from gouache.app.training.folder import RunFolder, curve, is_run, opened
from gouache.app.training.samples import LAST, pictures
from gouache.app.training.status import Status, status
from gouache.errors import RequestError, printable
from gouache.generate.picture import read_recipe

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


@dataclass(frozen=True)
class Entry:
    """A run, or with `step` its checkpoint of that step, called `name` in a report."""

    run: RunFolder
    step: int | None = None
    name: str = ""

    def log(self) -> list[Mapping[str, float]]:
        return [line for line in self.run.log() if self.step is None or line["step"] <= self.step]

    def settings(self) -> dict[str, Any]:
        """By name; of a checkpoint, those of training as they were then."""
        settings = dict(_flat(self.run.settings().model_dump(mode="json")))
        then = self.run.state(self.step).get("settings") if self.step is not None else None
        return settings | dict(_flat(then, "train.")) if isinstance(then, dict) else settings


def entry(text: str) -> Entry:
    """RUN, or RUN@STEP, RUN@best, RUN@last for a checkpoint. Raises GouacheError if there is none."""
    path, sign, step = text.rpartition("@")
    if not sign or is_run(Path(text)):
        return Entry(opened(Path(text)))
    run = opened(Path(path))
    return Entry(run, find_step(run, step))


def report(entries: Sequence[Entry]) -> str:
    """The page. Raises GouacheError if a run is named twice, or its settings or log cannot be read."""
    entries = _named(entries)
    several = len(entries) > 1
    states = {each.name: status(each.run) for each in entries}
    logs = {each.name: each.log() for each in entries}
    settings = {each.name: each.settings() for each in entries}
    title = f"{'Comparison' if several else 'Training'} of {', '.join(states)}"
    body = [
        f"<h1>{_text(title)}</h1>",
        *(_summary(each, states[each.name], several) for each in entries),
        "<h2>Curves</h2>",
        *_curves(logs),
        "<h2>Samples</h2>",
        _compared_samples(entries) if several else _samples(entries[0]),
        f"<h2>{'Settings that differ' if several else 'Settings'}</h2>",
        _settings(settings),
        *_changes(states),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _named(entries: Sequence[Entry]) -> list[Entry]:
    """With a name each: that of the folder, its path where two folders have the same name, and the step."""
    folders = list(dict.fromkeys(each.run.path.resolve() for each in entries))
    short = [path.name for path in folders]
    named = {path: path.name if short.count(path.name) == 1 else str(path) for path in folders}
    found = [
        replace(each, name=named[each.run.path.resolve()] + (f", step {each.step}" if each.step is not None else ""))
        for each in entries
    ]
    names = [each.name for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RequestError("runs", f"{printable(twice[0])} is named twice; name two runs, or two checkpoints")
    return found


def _summary(each: Entry, state: Status, titled: bool) -> str:
    facts = [*state.lines(), f"model {state.model}" + (f", SHA-256 {state.sha256}" if state.sha256 else "")]
    if state.data:
        facts.append(f"data SHA-256 {state.data}" if len(state.data) == 64 else f"data {state.data}")
    lines = "".join(f"<li>{_text(line)}</li>" for line in facts)
    remarks = "".join(f'<li class="note">{_text(remark)}</li>' for remark in state.remarks)
    head = f"<h2>{_text(each.name)}</h2>" if titled else ""
    return f"{head}<ul>{lines}{remarks}</ul>"


_VALIDATION = {
    "validation loss": "validation", "validation raw loss": "validation, last weights",
    "validation training loss": "training pictures", "validation raw training loss": "training pictures, last weights",
}  # fmt: skip
_TITLES = {"loss": "Loss", "rate": "Learning rate", "norm": "Gradient norm", "ema gap": "Gap of averages and weights",
           "skipped": "Skipped steps"}  # fmt: skip


def _curves(logs: Mapping[str, list[Mapping[str, float]]]) -> Iterator[str]:
    """Charts with a curve for each run: the loss, validations, and whatever else was measured.

    The validation losses of one run are in one chart, those by timestep in another.
    """
    several = len(logs) > 1
    measured = list(dict.fromkeys(name for lines in logs.values() for line in lines for name in line if name != "step"))
    by_timestep = [name for name in measured if " loss at " in name]
    single = [name for name in measured if name not in by_timestep and name not in _VALIDATION]
    order = [*(name for name in _TITLES if name in single), *(name for name in single if name not in _TITLES)]
    for name in order[:1]:
        yield _chart(_TITLES.get(name, name), name, logs)
    validations = [name for name in _VALIDATION if name in measured]
    if several:
        for name in validations:
            yield _chart(f"Validation loss ({_VALIDATION[name]})" if name != "validation loss" else "Validation loss",
                         name, logs)  # fmt: skip
    else:
        lines = next(iter(logs.values()))
        yield chart("Validation loss", [Curve(_VALIDATION[name], *curve(lines, name)) for name in validations])
    for run, lines in logs.items():
        for prefix, what in (("validation loss at ", ""), ("validation raw loss at ", ", last weights")):
            parts = [name for name in by_timestep if name.startswith(prefix)]
            title = f"Validation loss by timestep{what}{f', {run}' if several else ''}"
            yield chart(title, [Curve(f"t = {name.removeprefix(prefix)}", *curve(lines, name)) for name in parts])
    for name in order[1:]:
        yield _chart(_TITLES.get(name, name), name, logs)


def _chart(title: str, name: str, logs: Mapping[str, list[Mapping[str, float]]]) -> str:
    several = len(logs) > 1
    curves = [
        Curve(run if several else title, *curve(lines, name), smooth=name in ("loss", "norm"))
        for run, lines in logs.items()
    ]
    return chart(title, curves)


def _moments(each: Entry) -> dict[int, list[Path]]:
    """The samples of a run by step, up to its checkpoint."""
    moments: dict[int, list[Path]] = {}
    for step, _, _, path in pictures(each.run.samples):
        if each.step is None or step <= each.step:
            moments.setdefault(step, []).append(path)
    return moments


def _samples(each: Entry) -> str:
    moments = _moments(each)
    rows = "".join(
        f"<tr><th>step {step}</th><td class='samples'>{''.join(map(_picture, moments[step]))}</td></tr>"
        for step in _thinned(sorted(moments))
    )
    return f"<table>{rows}</table>" if rows else "<p>There are none.</p>"


def _compared_samples(entries: Sequence[Entry]) -> str:
    """A column for each run, with a row for each step; checkpoints are compared by the newest samples of each."""
    found = {each.name: _moments(each) for each in entries}
    if any(each.step is not None for each in entries):
        rows = [("newest", {name: max(moments, default=-1) for name, moments in found.items()})]
    else:
        steps = _thinned(sorted({step for moments in found.values() for step in moments}))
        rows = [(f"step {step}", dict.fromkeys(found, step)) for step in steps]
    if not any(found.values()):
        return "<p>There are none.</p>"
    head = "".join(f"<th>{_text(name)}</th>" for name in found)
    lines = ""
    for label, steps in rows:
        cells = "".join(
            f"<td class='samples'>{''.join(map(_picture, found[name].get(step, [])))}"
            f"{f'<br>step {step}' if label == 'newest' and step >= 0 else ''}</td>"
            for name, step in steps.items()
        )
        lines += f"<tr><th>{label}</th>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{lines}</table>"


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    if len(steps) <= _MOST_MOMENTS:
        return steps
    return [steps[round(index * (len(steps) - 1) / (_MOST_MOMENTS - 1))] for index in range(_MOST_MOMENTS)]


def _picture(path: Path) -> str:
    """With its prompt and seed as the title; "" for a picture that cannot be read."""
    try:
        recipe, picture = read_recipe(path)
    except RequestError:
        return ""
    said = recipe["request"]
    title = f"{said.get('prompt', '')}, seed {said.get('seed', '')}"
    title += ", last weights" if path.stem.endswith(LAST) else ""
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_text(path.name)}" title="{_text(title)}" src="data:image/jpeg;base64,{data}">'


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
