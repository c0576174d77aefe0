"""`gouache scan`. Needs no torch."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.outside import json_line
from gouache.wording import plural


def scan(
    paths: Annotated[list[str], Argument(metavar="PATH...", help="Files, or folders to search.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON, one object per file.")] = False,
) -> None:
    """Check files for hostile code without running it. Shows what it would do. Exit code 1 if any file is hostile."""
    from gouache.workshop.scan import scan as service

    verdicts = Counter[str]()
    for found in service([Path(path) for path in paths]):
        verdicts[found.verdict] += 1
        if as_json:
            print(json_line(asdict(found)), flush=True)
            continue
        print(f"{found.verdict:11} {found.path}: {found.reason}", flush=True)
        for intent in found.intents:
            arguments = f"({', '.join(map(repr, intent.arguments))})" if intent.arguments else ""
            offset = "" if intent.byte is None else f"byte {intent.byte}: "
            print(f"{'':11}   {offset}{intent.name}{arguments}: {intent.effect}")
    if not as_json:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        print(f"{plural(sum(verdicts.values()), 'file')}" + (f": {counts}" if counts else " to scan"))
    if verdicts["hostile"] or verdicts["suspicious"]:
        sys.exit(1)
    if verdicts["damaged"] or verdicts["not a model"] or verdicts["unreadable"]:
        sys.exit(2)
