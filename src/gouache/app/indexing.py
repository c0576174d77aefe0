"""Updates the library and hashes its new files, at the lowest priority, in a separate process.

    python -m gouache.app.indexing

It ends when all files are hashed. If it is killed, only the hash of the current file is lost. A second one started
meanwhile ends at once.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gouache.app.cache import make_private
from gouache.app.library import Library
from gouache.app.settings import Settings, read
from gouache.errors import GouacheError


def index(settings: Settings, should_stop: Callable[[], bool] = lambda: False) -> int:
    """Update the library and hash all files without a hash; returns the number of files hashed.

    `should_stop` is called between files. Returns 0 at once if another process is indexing.
    """
    with _lock(settings.cache / "indexing.lock") as locked:
        if not locked:
            return 0
        count = 0
        with Library.of(settings) as library:
            library.refresh()
            while not should_stop() and library.hash_next() is not None:
                count += 1
        return count


def start() -> bool:
    """Start `index` in a background process that outlives this one; False if GOUACHE_INDEX=0 forbids it."""
    if os.environ.get("GOUACHE_INDEX") == "0":
        return False
    nothing = subprocess.DEVNULL
    detached: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        detached = {"creationflags": 0x00000208}  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
    command = [sys.executable, "-m", "gouache.app.indexing"]
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, **detached)
    return True


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process got the lock on the file `path`. The lock of a killed process is released."""
    make_private(path.parent)
    # O_NONBLOCK: a named pipe of that name must not block; it cannot be locked either.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            yield False
            return
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock; two processes at once only do the same work twice
        except OSError:
            yield False
            return
        yield True


def main() -> int:
    if hasattr(os, "nice"):
        os.nice(19)
    try:
        index(read())
    except (GouacheError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
