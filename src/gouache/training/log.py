"""`log.jsonl`: the measurements of a run, one JSON object per line, each step once however often it was killed."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gouache.errors import TrainingError, printable
from gouache.files.write import write_atomic
from gouache.outside import parse_json, read_text

_MOST = 1 << 30  # bytes; a million steps with a line each take 150 MB


class Log:
    """Appends to `path`. Opened at `step`, it first removes the lines of later steps, since they will be repeated."""

    def __init__(self, path: Path, step: int) -> None:
        """Raises FileError if the old log cannot be read or written."""
        self.path = path
        if path.exists():
            text = read_text(path, _MOST, errors="replace")
            lines = [line for line in text.splitlines() if _step_of(line) <= step]
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())

    def write(self, **values: float) -> None:
        """One line of named numbers, with six significant digits. Raises TrainingError, as on a full disk."""
        line = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{printable(str(self.path))}: cannot be written: {error.strerror}; the checkpoints are kept, start "
                "the run again to resume it"
            ) from None


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):  # a killed run may have written half a line
        return math.inf
