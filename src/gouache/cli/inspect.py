"""`gouache inspect`. Needs no torch unless SD2's prediction has to be read off a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from gouache.workshop.inspect import Report


def inspect(
    file: Annotated[Path, Argument(help="A model file or folder.", show_default=False)],
    prediction: Annotated[str | None, Option(help="eps or v, where the file does not tell.")] = None,
    family: Annotated[str | None, Option(help="sd1, sd2, sdxl, ..., where the file does not tell.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a model file is: family, variant, parts, prediction, dtypes, each with its evidence."""
    from gouache.workshop.inspect import report

    told = report(file, prediction=prediction, family=family)
    print(json.dumps(told.to_json(), indent=1, ensure_ascii=False) if as_json else _page(told))


def _page(told: Report) -> str:
    lines = [f"{told.path}  ({told.format}, {told.size / 1e6:,.1f} MB, {told.count} tensors)"]
    for fact in told.facts:
        lines.append(f"  {fact.name:12} {fact.value:24} {fact.sure}: {fact.evidence}")
    if told.components:
        lines.append("parts")
        for part in told.components:
            lines.append(
                f"  {part.name:16} {part.parameters / 1e6:9.2f} M  {part.dtype:6} {part.layout}: {part.evidence}"
            )
    for name, reason in told.missing.items():
        lines.append(f"missing  {name}: {reason}")
    for reason, names in told.leftovers.items():
        lines.append(f"not needed  {len(names)} tensors, {names[0]}{', ...' if len(names) > 1 else ''}: {reason}")
    if told.unknown:
        lines.append(f"unknown  {len(told.unknown)} tensors: {', '.join(told.unknown[:5])}")
    for key, value in told.metadata.items():
        lines.append(f"metadata  {key}: {value}")
    lines += [f"note  {note}" for note in told.notes]
    return "\n".join(lines)
