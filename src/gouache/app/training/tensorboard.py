"""TensorBoard files of a run, made from its log and its samples by tensorboardX (extra `train`).

`log.jsonl` is the source: what it has is written, in its order. A resumed run, whose log was shortened to the step it
goes on from, writes new files from the start, so that no step is there twice.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gouache.app.training.folder import RunFolder
from gouache.app.training.samples import pictures
from gouache.errors import FileError, RequestError, printable
from gouache.images import pixels
from gouache.training.log import LOG, read_lines
from gouache.training.state import OnNote

_FILES = "events.out.tfevents.*"
_SECONDS = 10  # between updates: each reads the log


def is_wanted(setting: str) -> bool:
    """Whether to write them. Raises RequestError if they are asked for ("yes") without the package."""
    found = setting != "no" and importlib.util.find_spec("tensorboardX") is not None
    if setting == "yes" and not found:
        raise RequestError("tensorboard", "yes needs the package tensorboardX, which is not installed; or set it to no")
    return found


class Board:
    """Writes `RUN/tensorboard`: `update`, and the end of the block, add what the log and the samples have gained."""

    def __init__(self, run: RunFolder, on_note: OnNote) -> None:
        self._run, self._on_note, self._failed = run, on_note, False
        self._writer: Any = None
        self._log_file, self._lines, self._updated = -1, 0, -_SECONDS
        self._pictures: set[Path] = set()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.update(now=error is None)
        finally:
            self._close()

    def update(self, now: bool = False) -> None:
        """Every few seconds, or `now`. What cannot be written is reported once, and does not end a run."""
        if self._failed or (not now and time.monotonic() - self._updated < _SECONDS):
            return
        self._updated = time.monotonic()
        try:
            log = self._run.path / LOG
            if not log.exists():
                return
            file = log.stat().st_ino
            if file != self._log_file:  # the loop replaces a log that it shortens
                self._start()
                self._log_file = file
            lines = read_lines(log)
            for line in lines[self._lines :]:
                for name, value in line.items():
                    if name != "step" and isinstance(value, int | float):
                        self._writer.add_scalar(tag(name), value, int(line["step"]))
            self._lines = len(lines)
            self._add_pictures()
            self._writer.flush()
        except (OSError, FileError) as error:
            self._failed = True
            self._on_note(f"no more TensorBoard files: {printable(str(error))}")

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _start(self) -> None:
        from tensorboardX import SummaryWriter

        self._close()
        for path in self._run.tensorboard.glob(_FILES):
            path.unlink(missing_ok=True)
        self._lines, self._pictures = 0, set()
        self._writer = SummaryWriter(str(self._run.tensorboard))

    def _add_pictures(self) -> None:
        for step, number, ending, path in pictures(self._run.samples):
            if path in self._pictures:
                continue
            try:
                picture = pixels.read(path, "samples").convert("RGB")
            except RequestError:
                continue  # removed or damaged meanwhile
            self._writer.add_image(f"samples/{number:02d}{ending}", np.asarray(picture), step, dataformats="HWC")
            self._pictures.add(path)


def tag(name: str) -> str:
    """The name of a measurement in TensorBoard, which groups by what precedes a slash and allows no spaces."""
    group, rest = (
        ("validation", name.removeprefix("validation ")) if name.startswith("validation ") else ("train", name)
    )
    return f"{group}/{rest.replace(' ', '_')}"
