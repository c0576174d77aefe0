"""The folder of a run: where its parts are, and its measurements read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_json, read_outside, read_text
from gouache.training import run_settings, state
from gouache.training.run_settings import RunSettings

SETTINGS = "settings.toml"
STAGES = "stages.toml"  # in the folder of a training in stages, which has a run for each
_MOST = 1 << 30  # bytes of a log


@dataclass(frozen=True)
class RunFolder:
    """`path` has `settings.toml`, `log.jsonl`, checkpoints, `samples/`, `cache/` and other files of a run."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / SETTINGS

    @property
    def log_file(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def contents(self) -> Path:
        """The cache of hashes of pictures."""
        return self.cache / "contents.jsonl"

    @property
    def metadata(self) -> Path:
        """What exported files say of the data and the settings; written when the run begins."""
        return self.path / "metadata.json"

    @property
    def newest(self) -> Path:
        """The folder of the newest weights as a file that can be painted with; written when asked for."""
        return self.path / "newest"

    @property
    def is_started(self) -> bool:
        """Whether training has begun: there is something to go on with."""
        return self.log_file.exists() or bool(self.steps())

    def settings(self) -> RunSettings:
        """Raises FileError or RequestError."""
        return run_settings.read(self.settings_file)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        return [int(each.name[5:]) for each in state.checkpoints(self.path)]

    def checkpoint(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def has_averages(self, step: int) -> bool:
        """Whether the checkpoint of `step` has averaged weights (EMA)."""
        return any((self.checkpoint(step) / name).exists() for name in ("ema.safetensors", "ema"))  # whole, or in parts

    def state(self, step: int | None = None) -> Mapping[str, Any]:
        """The values of the checkpoint of `step`, or of the newest; empty if there is none that can be read."""
        paths = reversed(state.checkpoints(self.path)) if step is None else (self.checkpoint(step),)
        for path in paths:
            try:
                values = parse_json(read_outside(path / "state.json"))
            except (MalformedText, FileError):
                continue  # damaged, or removed by the run meanwhile
            if isinstance(values, dict):
                return values
        return {}

    def best_step(self) -> int:
        """The step with the lowest validation loss; -1 if nothing was measured."""
        ranking = self.state().get("ranking") or []
        return int(ranking[0][1]) if ranking else -1

    def log(self) -> list[Mapping[str, float]]:
        """The lines of the log that are whole: numbers by name, each with "step". Raises FileError."""
        if not self.log_file.exists():
            return []
        lines = list[Mapping[str, float]]()
        for line in read_text(self.log_file, _MOST, errors="replace").splitlines():
            try:
                values = parse_json(line)
            except MalformedText:
                continue  # a killed run may have written half a line
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                lines.append({name: value for name, value in values.items() if _is_number(value)})
        return lines


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run."""
    try:
        return (path / SETTINGS).is_file()
    except (OSError, ValueError):
        return False


def opened(path: Path) -> RunFolder:
    """The run in the folder `path`, or whose settings file is `path`. Raises RequestError if there is none."""
    if is_run(path):
        return RunFolder(path)
    if path.name == SETTINGS and is_run(path.parent):
        return RunFolder(path.parent)
    if not path.exists():
        raise FileError(path, "does not exist")
    check_single(path)
    raise RequestError("run", f"{printable(str(path))} is not the folder of a training run: it has no {SETTINGS}")


def check_single(path: Path) -> None:
    """Raises RequestError for the folder of a training in stages, of which one has to be named."""
    if not (path / STAGES).is_file():
        return
    begun = sorted(
        (each for each in path.iterdir() if is_run(each)),
        key=lambda each: RunFolder(each).settings_file.stat().st_mtime,
    )
    such = f", such as {printable(str(begun[-1]))}" if begun else "; none has begun"
    raise RequestError("run", f"{printable(str(path))} is a training in stages; name one of them{such}")


def curve(lines: list[Mapping[str, float]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the measurement `name`."""
    points = [(int(line["step"]), line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
