"""`gouache inspect`. Needs torch only to detect SD2's prediction type from a weight, and for `--deep`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from gouache.outside import json_line
from gouache.wording import plural

if TYPE_CHECKING:
    from gouache.workshop.inspect import Report


def inspect(
    files: Annotated[
        list[str],
        Argument(metavar="FILE|FOLDER...", help="Model files, folders, or names of models.", show_default=False),
    ],
    prediction: Annotated[
        str | None, Option(help="Prediction type, eps or v.", show_default="detected from the file")
    ] = None,
    family: Annotated[
        str | None, Option(help="Model family: sd1, sd2, sdxl, ...", show_default="detected from the file")
    ] = None,
    keys: Annotated[bool, Option("--keys", help="List every tensor with its dtype and shape.")] = False,
    deep: Annotated[bool, Option("--deep", help="Also read the weights: damage, fingerprints, hashes.")] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print JSON: an object, or a list if several files are given.")
    ] = False,
) -> None:
    """Show what a model file is, with the evidence: kind, family, components, prediction, dtypes, training."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.errors import FileError
    from gouache.workshop.advice import compare
    from gouache.workshop.inspect import files_of, report

    settings = read()
    paths = [path for name in files for path in files_of(resolve(name, settings))]
    reports: list[Report] = []
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
        reports.append(each)
        if not as_json:
            print(_page(each), flush=True)
    if as_json:
        pages = [each.to_json() for each in reports]
        print(json_line(pages[0] if len(paths) == 1 else pages, indent=1))
    else:
        pairs = [(each.file, each.found) for each in reports if each.file is not None and each.found is not None]
        for line in compare(pairs):
            print(f"of these models, {line}")
    if failed:
        sys.exit(2)


def _page(report: Report) -> str:
    lines = [f"{report.path}  ({report.format}, {report.size / 1e6:,.1f} MB, {plural(report.count, 'tensor')})"]
    for fact in report.facts:
        if fact.value == "unknown":  # a confidence would be confusing here
            missing = "not recognised"
            text = fact.evidence if fact.evidence.startswith(missing) else f"{missing} ({fact.evidence})"
            lines.append(f"  {fact.name:13}  {text}")
        else:
            lines.append(f"  {fact.name:13}  {fact.value:23}  {fact.confidence}: {fact.evidence}")
    for detail in report.details:
        lines.append(f"  {detail.name:13}  {detail.value:23}  {detail.evidence}")
    if report.components:
        lines.append("components")
        for part in report.components:
            fingerprint = f"  {part.fingerprint}" if part.fingerprint else ""
            size = f"{part.parameters / 1e6:9.2f} M"
            lines.append(f"  {part.name:15}  {size}  {part.dtype:6}  {part.layout}: {part.evidence}{fingerprint}")
    for name, reason in report.missing.items():
        lines.append(f"missing  {name}: {reason}")
    for reason, names in report.leftovers.items():
        count = plural(len(names), "tensor")
        lines.append(f"not needed  {count}, {names[0]}{', ...' if len(names) > 1 else ''}: {reason}")
    outside = set(report.outside)
    ignored = {name: near for name, near in report.unknown.items() if name in outside}
    inside = {name: near for name, near in report.unknown.items() if name not in ignored}
    for names, effect in ((inside, ""), (ignored, ", outside every component, ignored when painting")):
        if names:
            lines.append(f"not recognised  {plural(len(names), 'tensor')}{effect}:")
        for name, near in list(names.items())[:5]:
            lines.append(f"  {name}{f', most similar to {near}' if near else ''}")
    for key, value in report.metadata.items():
        lines.append(f"metadata  {key}: {value}")
    if report.faults is not None:
        found = f"in {plural(len(report.faults), 'tensor')}:" if report.faults else "none found"
        lines.append(f"damage  {found}")
        lines += [
            f"  {fault.tensor} {fault.what}{'' if fault.serious else ' (harmless)'}" for fault in report.faults[:20]
        ]
    if report.hashes is not None:
        lines += [f"hash  {kind:7} {digest}" for kind, digest in vars(report.hashes).items() if digest]
    lines += [f"note  {note}" for note in report.notes]
    lines += [f"advice  {hint}" for hint in report.advice]
    if report.keys is not None:
        lines += [f"tensor  {name}: {info}" for name, info in report.keys.items()]
    return "\n".join(lines)
