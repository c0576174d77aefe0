"""Checks whether a model file still has the hash that is recorded for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gouache.app.entry import Entry
from gouache.app.hashes import read_now
from gouache.app.library import Library
from gouache.errors import GouacheError, printable
from gouache.files.open import open_model


@dataclass(frozen=True)
class Verified:
    """`good`: it can be opened and has the hash recorded in the library and in its sidecar files. `reason`: a text."""

    path: str
    good: bool
    reason: str
    sha256: str


def verify(entry: Entry, library: Library, on_work: Callable[[str, int, int], None] | None = None) -> Verified:
    """Read the whole model, even if a hash is cached, and compare. If no hash was recorded, this one is."""
    path = printable(str(entry.path))
    try:
        digest = read_now(entry.path, on_work)
        open_model(entry.path)
    except (GouacheError, OSError) as error:
        return Verified(path, False, printable(str(error), 400), "")
    published = (entry.known.sha256 or {}).values() if entry.known else ()
    if entry.sha256 and digest != entry.sha256:
        reason = f"its hash is {digest}; {entry.sha256} was recorded for the same size and time: it is damaged"
        return Verified(path, False, reason, digest)
    if entry.sidecar.sha256 and digest != entry.sidecar.sha256:
        reason = f"its hash is {digest}; the file next to it with its metadata gives {entry.sidecar.sha256}"
        return Verified(path, False, reason, digest)
    if not entry.sha256:
        library.store_hash(entry.path, digest)
    if digest in published:
        reason = "same hash as published"
    elif entry.sha256 or entry.sidecar.sha256:
        reason = "same hash as recorded"
    else:
        reason = "opens; no hash was recorded before, this one is now"
    return Verified(path, True, reason, digest)
