"""`gouache scan`. Needs no torch."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def scan(
    paths: Annotated[list[Path], Argument(metavar="PATH...", help="Files, or folders to search.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON, an object a file.")] = False,
) -> None:
    """Tell which files are safe to open, and what the others would have done. Exit code 1 if any is hostile."""
    from gouache.workshop.scan import scan as service

    verdicts = Counter[str]()
    for found in service(paths):
        verdicts[found.verdict] += 1
        if as_json:
            print(json.dumps(asdict(found), ensure_ascii=False), flush=True)
            continue
        print(f"{found.verdict:10}  {found.path}: {found.reason}", flush=True)
        for intent in found.intents:
            given = f"({', '.join(map(repr, intent.arguments))})" if intent.arguments else ""
            where = "" if intent.byte is None else f"byte {intent.byte}: "
            print(f"{'':10}    {where}{intent.name}{given}: {intent.effect}")
        for name in found.mentions:
            print(f"{'':10}    {name}")
    if not as_json:
        print(f"{sum(verdicts.values())} files: " + (", ".join(f"{n} {v}" for v, n in verdicts.items()) or "none"))
    if verdicts["hostile"] or verdicts["suspicious"]:
        sys.exit(1)
    if verdicts["damaged"] or verdicts["no model"] or verdicts["unreadable"]:
        sys.exit(2)
