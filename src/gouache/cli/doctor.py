"""`gouache doctor`."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option


def doctor(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Look at this machine: torch, devices, dtypes, memory, model folders, and one timed step."""
    from gouache.app.doctor import examine
    from gouache.app.settings import read

    findings = examine(read())
    if as_json:
        print(json.dumps(findings, indent=1))
        return
    for topic, lines in findings.items():
        for index, line in enumerate(lines):
            print(f"{topic if index == 0 else '':10}{line}")
