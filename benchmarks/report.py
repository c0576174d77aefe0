"""What all benchmarks report: the machine, progress, and stored results."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, str]:
    """The processor, Python, and the versions of `packages`."""
    model = next(
        (line.split(":")[1].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = {name: version(name) for name in packages}
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), **versions}


def lines(path: str) -> list[str]:
    """The lines of a system file; [] if it does not exist."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def store(name: str, result: dict[str, Any], table: str) -> None:
    """Store a result under today's date, as JSON and as a Markdown table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}"
    path.with_name(f"{path.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_name(f"{path.name}.md").write_text(table)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
