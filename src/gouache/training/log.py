"""`log.jsonl`: the measurements of a run, one JSON object per line, each step once however often it was killed."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gouache.files.write import write_atomic


class Log:
    """Appends to `path`. Opened at `step`, it first removes the lines of later steps, since they will be repeated."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())

    def write(self, **values: float) -> None:
        """One line of named numbers, with six significant digits."""
        line = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a killed run may have written half a line
        return math.inf
