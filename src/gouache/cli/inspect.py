"""`gouache inspect`. Needs no torch unless SD2's prediction has to be read off a weight, or weights are asked for."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from gouache.workshop.inspect import Report


def inspect(
    files: Annotated[
        list[str],
        Argument(metavar="FILE|FOLDER...", help="Model files, folders, or names of models.", show_default=False),
    ],
    prediction: Annotated[str | None, Option(help="eps or v, where the file does not tell.")] = None,
    family: Annotated[str | None, Option(help="sd1, sd2, sdxl, ..., where the file does not tell.")] = None,
    keys: Annotated[bool, Option("--keys", help="List every tensor with its dtype and shape.")] = False,
    deep: Annotated[bool, Option("--deep", help="Read the weights too: damage, fingerprints, hashes.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON: an object, or of several files a list.")] = False,
) -> None:
    """Tell what a model file is: kind, family, parts, prediction, dtypes, training; each with its evidence."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.errors import FileError
    from gouache.workshop.advice import compare
    from gouache.workshop.inspect import files_of, report

    settings = read()
    paths = [path for name in files for path in files_of(resolve(name, settings))]
    told: list[Report] = []
    failed = 0
    for path in paths:
        try:
            with bytes_bar() as bar:
                each = report(
                    path, prediction=prediction, family=family, keys=keys, deep=deep,
                    on_work=bar.show if deep else None,
                )  # fmt: skip
        except FileError as error:
            if len(paths) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        told.append(each)
        if not as_json:
            print(_page(each), flush=True)
    if as_json:
        pages = [each.to_json() for each in told]
        print(json.dumps(pages[0] if len(paths) == 1 else pages, indent=1, ensure_ascii=False))
    else:
        pairs = [(each.file, each.found) for each in told if each.file is not None and each.found is not None]
        for line in compare(pairs):
            print(f"of these, {line}")
    if failed:
        sys.exit(2)


def _page(told: Report) -> str:
    lines = [f"{told.path}  ({told.format}, {told.size / 1e6:,.1f} MB, {told.count} tensors)"]
    for fact in told.facts:
        lines.append(f"  {fact.name:14} {fact.value:24} {fact.sure}: {fact.evidence}")
    for detail in told.details:
        lines.append(f"  {detail.name:14} {detail.value:24} {detail.evidence}")
    if told.components:
        lines.append("parts")
        for part in told.components:
            seal = f"  {part.fingerprint}" if part.fingerprint else ""
            lines.append(
                f"  {part.name:16} {part.parameters / 1e6:9.2f} M  {part.dtype:6} {part.layout}: {part.evidence}{seal}"
            )
    for name, reason in told.missing.items():
        lines.append(f"missing  {name}: {reason}")
    for reason, names in told.leftovers.items():
        lines.append(f"not needed  {len(names)} tensors, {names[0]}{', ...' if len(names) > 1 else ''}: {reason}")
    if told.unknown:
        lines.append(f"unknown  {len(told.unknown)} tensors:")
        for name, near in list(told.unknown.items())[:5]:
            lines.append(f"  {name}{f', most like {near}' if near else ''}")
    for key, value in told.metadata.items():
        lines.append(f"metadata  {key}: {value}")
    if told.faults is not None:
        lines.append("damage  none found" if not told.faults else f"damage  {len(told.faults)} tensors:")
        lines += [
            f"  {fault.tensor} {fault.what}{'' if fault.serious else ' (harmless)'}" for fault in told.faults[:20]
        ]
    if told.hashes is not None:
        lines += [f"hash  {kind:7} {digest}" for kind, digest in vars(told.hashes).items() if digest]
    lines += [f"note  {note}" for note in told.notes]
    lines += [f"advice  {hint}" for hint in told.advice]
    if told.keys is not None:
        lines += [f"tensor  {name}: {kind}" for name, kind in told.keys.items()]
    return "\n".join(lines)
