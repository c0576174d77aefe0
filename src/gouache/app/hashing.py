"""The hash of a model file, computed beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gouache.app import hashes
from gouache.app.settings import Settings
from gouache.files.record import ModelFile

OnWork = Callable[[str, int, int], None]
"""(what, done, total) of a work in progress, in bytes."""

POLL = 0.2  # seconds between reports


class BackgroundHash:
    """`start` computes the hash of `file` in a thread unless it is cached; `result` waits for it."""

    def __init__(self, file: ModelFile, settings: Settings) -> None:
        self._file, self._settings = file, settings
        self._thread: threading.Thread | None = None
        self._value: str | None = None
        self._error: Exception | None = None
        self._done = 0

    def start(self) -> None:
        """Does nothing if it was started before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gouache hash", daemon=True)
            self._thread.start()

    def result(self, on_work: OnWork | None = None) -> str:
        """The hash; `on_work` is called while it is awaited. Raises FileError if the file cannot be read."""
        self.start()
        assert self._thread is not None
        total = sum(path.stat().st_size for path in self._file.files) if on_work is not None else 0
        while self._thread.is_alive():
            self._thread.join(POLL)
            if on_work is not None and self._thread.is_alive():
                on_work("hashing the model", self._done, total)
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value

    def _run(self) -> None:
        try:
            self._value = hashes.sha256(self._file, self._settings, self._count)
        except Exception as error:  # raised again where the result is asked for
            self._error = error

    def _count(self, read: int) -> None:
        self._done += read
