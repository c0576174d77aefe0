"""Looking through the library's places and hashing what is new, at the lowest priority, in a process of its own.

    python -m gouache.app.indexing

It ends when all is hashed. Killed, it loses at most the file it was reading. Two do not run at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gouache.app.library import Library
from gouache.app.settings import Settings, read
from gouache.errors import GouacheError


def index(settings: Settings, stopped: Callable[[], bool] = lambda: False) -> int:
    """Bring the library up to date and hash all that is not hashed; the number of files read whole.

    `stopped` is asked between files. Returns 0 at once where another is at it.
    """
    with _alone(settings.cache / "indexing.lock") as mine:
        if not mine:
            return 0
        count = 0
        with Library.of(settings) as library:
            library.refresh()
            while not stopped() and library.hash_next() is not None:
                count += 1
        return count


def start() -> None:
    """Begin `index` in the background; it outlives this process."""
    if os.environ.get("GOUACHE_INDEX") == "0":
        return
    nothing = subprocess.DEVNULL
    detached: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        detached = {"creationflags": 0x00000208}  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
    command = [sys.executable, "-m", "gouache.app.indexing"]
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, **detached)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process is the one that holds the lock at `path`; a killed holder's is free again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock; two at once only do the same work twice
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
