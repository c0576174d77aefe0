"""The library: which models there are, what each is, and what the user noted about them. SQLite, `library.sqlite`.

`refresh` searches all folders and reads the headers of new files: milliseconds per file. `hash_next` reads whole files,
one per call, and should run in the background (`app.indexing`). A file that was moved or renamed is recognised by its
hash. Model files are never changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from gouache.app import sidecars
from gouache.app.entry import About, Entry, read_header
from gouache.app.hashes import sha256, sha256_of
from gouache.app.search_paths import Candidate, candidates
from gouache.app.settings import DATABASE, Settings
from gouache.app.sidecars import Sidecar
from gouache.app.tables import AboutRow, FileRow, connect
from gouache.errors import GouacheError, RequestError, printable
from gouache.files.open import open_model

OnWork = Callable[[str, int, int], None]


@dataclass
class Changes:
    """The result of `Library.refresh`: paths that are new, changed or gone, and (from, to) of those that were moved."""

    new: list[Path] = field(default_factory=list)
    changed: list[Path] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)
    moved: list[tuple[Path, Path]] = field(default_factory=list)


class Library:
    """An open library. To be used from one thread only; other processes may have it open at the same time."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._settings = settings
        self._engine = connect(path)
        self._session = Session(self._engine)

    @classmethod
    def of(cls, settings: Settings) -> Library:
        return cls(settings.data / DATABASE, settings)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()
        self._engine.dispose()

    def refresh(self, on_work: OnWork | None = None) -> Changes:
        """Search all folders; read the headers of new and changed files, and the sidecar files of all.

        Raises FileError if the database cannot be written, or a list of folders cannot be read.
        """
        changes, rows = Changes(), self._rows()
        found = list(candidates(self._settings))
        for number, candidate in enumerate(found):
            if on_work is not None:
                on_work("searching", number, len(found))
            self._update(candidate, rows, changes)
        present = {os.fsencode(candidate.path) for candidate in found}
        for key, row in rows.items():
            if key not in present and not row.missing:
                row.missing = True
                changes.gone.append(row.location)
        self._session.flush()
        self._detect_moved(changes)
        self._session.commit()
        return changes

    def _update(self, candidate: Candidate, rows: dict[bytes, FileRow], changes: Changes) -> None:
        key = os.fsencode(candidate.path)
        try:
            size, mtime = _size_and_mtime(candidate.path)
        except OSError:
            return  # deleted since it was listed, or not readable
        row = rows.get(key)
        if row is None or (row.size, row.mtime_ns) != (size, mtime):
            (changes.new if row is None else changes.changed).append(candidate.path)
            if row is None:
                row = rows[key] = FileRow(path=key)
                self._session.add(row)
            row.size, row.mtime_ns, row.sha256 = size, mtime, _hub_hash(candidate.path)
            row.kind, row.family, row.facts, row.error = read_header(candidate.path)
        _set(row, names=list(candidate.names), folder_category=candidate.category, missing=False)
        _set(row, sidecar=_with_lists(sidecars.read(candidate.path)))

    def _detect_moved(self, changes: Changes) -> None:
        """Hash the new files that have the size of a missing one: they may be the same file under another name."""
        missing_sizes = {row.size for row in self._rows().values() if row.missing and row.sha256}
        for path in changes.new:
            row = self._session.get_one(FileRow, os.fsencode(path))
            if row.size in missing_sizes:
                self._hash(row, changes)

    def hash_next(self) -> Entry | None:
        """Compute the hash of one file that has none; None if all have one. Raises FileError."""
        row = next(iter(self._unhashed_rows()), None)
        if row is None:
            return None
        self._hash(row, Changes())
        self._session.commit()
        return self._entry(row)

    @property
    def unhashed(self) -> tuple[int, int]:
        """(files, bytes) that `hash_next` still has to read."""
        rows = self._unhashed_rows()
        return len(rows), sum(row.size for row in rows)

    def _unhashed_rows(self) -> list[FileRow]:
        return [row for row in self._rows().values() if not row.sha256 and not row.missing and not row.error]

    def store_hash(self, path: Path, sha256: str) -> None:
        """Store a hash that was computed elsewhere."""
        if (row := self._session.get(FileRow, os.fsencode(path))) is not None:
            row.sha256 = sha256
            self._session.commit()

    def _hash(self, row: FileRow, changes: Changes) -> None:
        try:
            row.sha256 = _digest(row.location, self._settings)
        except (GouacheError, OSError) as error:
            row.error = printable(str(error), 400)
            return
        same = select(FileRow).where(FileRow.sha256 == row.sha256, FileRow.missing)
        for before in self._session.scalars(same).all():
            changes.moved.append((before.location, row.location))
            row.added = before.added
            self._session.delete(before)

    def entries(self, kind: str = "", family: str = "", tag: str = "", missing: bool = False) -> list[Entry]:
        """Models in name order; only those of a `kind` or category, `family` or `tag`. `missing`: the deleted ones."""
        found = [self._entry(row) for row in self._rows().values() if row.missing == missing]
        kept = [
            each
            for each in found
            if (not kind or kind in (each.category, each.kind))
            and (not family or each.family == family)
            and (not tag or tag.casefold() in (one.casefold() for one in each.details.tags))
        ]
        return sorted(kept, key=lambda each: (each.name.casefold(), str(each.path)))

    def find(self, words: str) -> list[Entry]:
        """Models for which every word occurs in a name, title, tag, note, description, trigger word or other text."""
        wanted = words.casefold().split()
        return [each for each in self.entries() if all(word in _all_text(each) for word in wanted)]

    def entry(self, path: Path) -> Entry | None:
        """The model at `path`; None if it is not in the library."""
        row = self._session.get(FileRow, os.fsencode(path))
        return None if row is None else self._entry(row)

    def read_entry(self, path: Path) -> Entry:
        """An entry for a model that is in no folder of the library, from its header and sidecar files. Not stored."""
        size, mtime = _size_and_mtime(path)
        kind, family, facts, error = read_header(path)
        return Entry(
            path=path, names=(path.stem, path.name), size=size, folder_category="", kind=kind, family=family,
            facts=facts, sidecar=sidecars.read(path), about=About(), error=error, sha256="", missing=False,
            added=datetime.fromtimestamp(mtime / 1e9, UTC),
        )  # fmt: skip

    def paths_of_hash(self, start: str) -> list[Path]:
        """The existing files whose hash begins with `start`."""
        rows = self._session.scalars(select(FileRow).where(FileRow.sha256.startswith(start, autoescape=True)))
        return [row.location for row in rows if row.location.exists()] if start else []

    def describe(self, path: Path, **values: Any) -> Entry:
        """Store what the user notes about the model at `path`: fields of About, which replace their former values.

        If the model has no hash yet, it is computed. Raises RequestError for values out of range, FileError.
        """
        row = self._session.get(FileRow, os.fsencode(path))
        if row is None:
            raise RequestError("model", f"{path} is not in the library; add its folder with `gouache models add`")
        about = replace(self._about(row), **values)
        if not row.sha256:
            row.sha256 = _digest(row.location, self._settings)
        about_row = self._session.get(AboutRow, row.sha256) or AboutRow(sha256=row.sha256)
        for name, value in _with_lists(about).items():
            setattr(about_row, name, value)
        self._session.add(about_row)
        self._session.commit()
        return self._entry(row)

    def forget(self, paths: Iterable[Path]) -> None:
        """Delete the rows of these files. The user's notes are kept, in case the models are added again."""
        for path in paths:
            if (row := self._session.get(FileRow, os.fsencode(path))) is not None:
                self._session.delete(row)
        self._session.commit()

    def _rows(self) -> dict[bytes, FileRow]:
        return {row.path: row for row in self._session.scalars(select(FileRow))}

    def _about(self, row: FileRow) -> About:
        about_row = self._session.get(AboutRow, row.sha256) if row.sha256 else None
        if about_row is None:
            return About()
        return About(**_with_tuples({each.name: getattr(about_row, each.name) for each in fields(About)}))

    def _entry(self, row: FileRow) -> Entry:
        return Entry(
            path=row.location, names=tuple(row.names), size=row.size, folder_category=row.folder_category,
            kind=row.kind, family=row.family, facts=row.facts, sidecar=Sidecar(**_with_tuples(row.sidecar)),
            about=self._about(row), error=row.error, sha256=row.sha256, missing=row.missing,
            added=row.added.replace(tzinfo=UTC),
        )  # fmt: skip


def _size_and_mtime(path: Path) -> tuple[int, int]:
    """(bytes, newest modification time in ns) of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    stats = [each.stat() for each in files]
    return sum(each.st_size for each in stats), max((each.st_mtime_ns for each in stats), default=0)


def _hub_hash(path: Path) -> str:
    """In the Hugging Face cache a large file is named by its SHA-256, and the snapshot contains a link to it."""
    real = path.resolve()
    name = real.name
    return name if real.parent.name == "blobs" and len(name) == 64 and set(name) <= set("0123456789abcdef") else ""


def _digest(path: Path, settings: Settings) -> str:
    return sha256(open_model(path), settings) if path.is_dir() else sha256_of(path, settings)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the tuples of our dataclasses."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _with_lists(record: Sidecar | About) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


def _set(row: FileRow, **values: Any) -> None:
    """Set only values that differ, so that a refresh without changes writes nothing."""
    for name, value in values.items():
        if getattr(row, name, None) != value:
            setattr(row, name, value)


def _all_text(entry: Entry) -> str:
    details = entry.details
    texts = [
        *entry.names, str(entry.path), entry.kind, entry.family, entry.sha256, details.title, *details.tags,
        details.notes, *details.trigger_words, details.base, details.use, entry.sidecar.description,
        *(str(value) for value in entry.facts.values()),
    ]  # fmt: skip
    return "\n".join(texts).casefold()
