"""`gouache doctor`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from gouache.outside import json_line


def doctor(
    measure: Annotated[
        bool, Option("--measure", help="Measure again which dtype is the fastest, and store the result.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report on this machine: torch, devices, dtypes, memory, model folders, and the time of one step."""
    from gouache.app.doctor import examine
    from gouache.app.settings import read

    report = examine(read(), measure)
    if as_json:
        print(json_line(report, 1))
        return
    for topic, lines in report.items():
        for index, line in enumerate(lines):
            print(f"{topic if index == 0 else '':10}{line}")
