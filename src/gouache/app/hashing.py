"""The hash of a model file, computed beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gouache.app import hashes
from gouache.app.settings import Settings
from gouache.errors import FileError
from gouache.files.record import ModelFile

OnWork = Callable[[str, int, int], None]
"""(what, done, total) of a work in progress, in bytes."""

POLL = 0.2  # seconds between reports


class BackgroundHash:
    """`start` computes the hash of `file` in a thread unless it is cached; `result` waits for it.

    After an error the next `start` tries again. Threads may share one.
    """

    def __init__(self, file: ModelFile, settings: Settings) -> None:
        self._file, self._settings = file, settings
        self._thread: threading.Thread | None = None
        self._value: str | None = None
        self._error: Exception | None = None
        self._done, self._size = 0, 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Does nothing if it is running or done."""
        with self._lock:
            running = self._thread is not None and self._thread.is_alive()
            if self._value is None and not running:
                self._error = None
                self._thread = threading.Thread(target=self._run, name="gouache hash", daemon=True)
                self._thread.start()

    def result(self, on_work: OnWork | None = None) -> str:
        """The hash; `on_work` is called while it is awaited. Raises FileError if the file cannot be read."""
        if self._error is None:  # else of a start that nobody has asked about yet
            self.start()
        thread = self._thread
        while thread is not None and thread.is_alive():
            thread.join(POLL)
            if on_work is not None and thread.is_alive():
                on_work("hashing the model", self._done, self._size)
        if self._value is None:
            error, self._error = self._error, None
            raise error or FileError(self._file.path, "could not be hashed")
        return self._value

    def _run(self) -> None:
        try:
            self._size = sum(path.stat().st_size for path in self._file.files)
            self._value = hashes.sha256(self._file, self._settings, self._count)
        except OSError as error:
            self._error = FileError(self._file.path, f"cannot be read: {error.strerror}")
        except Exception as error:  # raised again where the result is asked for
            self._error = error

    def _count(self, read: int) -> None:
        self._done += read
