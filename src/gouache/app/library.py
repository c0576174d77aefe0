"""The library: which models there are, what each is, and what the user said of them. SQLite, `library.sqlite`.

`refresh` looks through all places and reads the headers of what is new: milliseconds a file. `hash_next` reads whole
files, one at a time, and belongs in the background (`app.indexing`); by its hash a file that was moved or renamed is
known again. Files themselves are never changed.
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
from gouache.app.entry import About, Entry, header
from gouache.app.hashes import sha256, sha256_of
from gouache.app.places import Candidate, candidates
from gouache.app.settings import DATABASE, Settings
from gouache.app.sidecars import Sidecar
from gouache.app.tables import AboutRow, FileRow, connect
from gouache.errors import GouacheError, RequestError, printable
from gouache.files.open import open_model

OnWork = Callable[[str, int, int], None]


@dataclass
class Changes:
    """What a look through the places found: paths that are new, changed, gone, and (from, to) of those that moved."""

    new: list[Path] = field(default_factory=list)
    changed: list[Path] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)
    moved: list[tuple[Path, Path]] = field(default_factory=list)


class Library:
    """An open library. Its methods may be called from one thread; other processes may have it open too."""

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

    # Looking

    def refresh(self, on_work: OnWork | None = None) -> Changes:
        """Look through all places; read the headers of files that are new or changed, and what lies beside each.

        Raises FileError where the database cannot be written, or a list of folders cannot be read.
        """
        changes, rows = Changes(), self._rows()
        found = list(candidates(self._settings))
        for number, candidate in enumerate(found):
            if on_work is not None:
                on_work("looking", number, len(found))
            self._see(candidate, rows, changes)
        present = {os.fsencode(candidate.path) for candidate in found}
        for key, row in rows.items():
            if key not in present and not row.missing:
                row.missing = True
                changes.gone.append(row.where)
        self._session.flush()
        self._moved(changes)
        self._session.commit()
        return changes

    def _see(self, candidate: Candidate, rows: dict[bytes, FileRow], changes: Changes) -> None:
        key = os.fsencode(candidate.path)
        try:
            size, mtime = _measure(candidate.path)
        except OSError:
            return  # gone since it was listed, or not ours to read
        row = rows.get(key)
        if row is None or (row.size, row.mtime_ns) != (size, mtime):
            (changes.new if row is None else changes.changed).append(candidate.path)
            if row is None:
                row = rows[key] = FileRow(path=key)
                self._session.add(row)
            row.size, row.mtime_ns, row.sha256 = size, mtime, _hub_hash(candidate.path)
            row.kind, row.family, row.facts, row.trouble = header(candidate.path)
        _set(row, names=list(candidate.names), place=candidate.kind, missing=False)
        _set(row, sidecar=_as_json(sidecars.read(candidate.path)))

    def _moved(self, changes: Changes) -> None:
        """A new file as large as a missing one is hashed at once: it may be the same under another name."""
        lost = {row.size for row in self._rows().values() if row.missing and row.sha256}
        for path in changes.new:
            row = self._session.get_one(FileRow, os.fsencode(path))
            if row.size in lost:
                self._hash(row, changes)

    def hash_next(self) -> Entry | None:
        """Compute the hash of one file that has none; None when all have theirs. Raises FileError."""
        waiting = (row for row in self._rows().values() if not row.sha256 and not row.missing and not row.trouble)
        row = next(waiting, None)
        if row is None:
            return None
        self._hash(row, Changes())
        self._session.commit()
        return self._entry(row)

    @property
    def waiting(self) -> tuple[int, int]:
        """(files, bytes) that `hash_next` has yet to read."""
        rows = [row for row in self._rows().values() if not row.sha256 and not row.missing and not row.trouble]
        return len(rows), sum(row.size for row in rows)

    def note_hash(self, path: Path, sha256: str) -> None:
        """Keep a hash that somebody has computed anyway."""
        if (row := self._session.get(FileRow, os.fsencode(path))) is not None:
            row.sha256 = sha256
            self._session.commit()

    def _hash(self, row: FileRow, changes: Changes) -> None:
        try:
            row.sha256 = _digest(row.where, self._settings)
        except (GouacheError, OSError) as error:
            row.trouble = printable(str(error), 400)
            return
        same = select(FileRow).where(FileRow.sha256 == row.sha256, FileRow.missing)
        for before in self._session.scalars(same).all():
            changes.moved.append((before.where, row.where))
            row.added = before.added
            self._session.delete(before)

    # Asking

    def entries(self, kind: str = "", family: str = "", tag: str = "", missing: bool = False) -> list[Entry]:
        """Models in name order; those of a `kind`, `family` or `tag` only, and those that are `missing`, if asked."""
        found = [self._entry(row) for row in self._rows().values() if row.missing == missing]
        kept = [
            each
            for each in found
            if (not kind or kind in (each.shelf, each.kind))
            and (not family or each.family == family)
            and (not tag or tag.casefold() in (one.casefold() for one in each.said.tags))
        ]
        return sorted(kept, key=lambda each: (each.name.casefold(), str(each.path)))

    def find(self, words: str) -> list[Entry]:
        """Models of which every word of `words` is told somewhere: in names, titles, tags, notes, descriptions, ..."""
        wanted = words.casefold().split()
        return [each for each in self.entries() if all(word in _everything(each) for word in wanted)]

    def entry(self, path: Path) -> Entry | None:
        """The model at `path`, None if the library has none there."""
        row = self._session.get(FileRow, os.fsencode(path))
        return None if row is None else self._entry(row)

    def look(self, path: Path) -> Entry:
        """What its header and the files beside it tell of a model outside all places. Nothing is noted of it."""
        size, mtime = _measure(path)
        kind, family, facts, trouble = header(path)
        return Entry(
            path=path, names=(path.stem, path.name), size=size, place="", kind=kind, family=family, facts=facts,
            sidecar=sidecars.read(path), about=About(), trouble=trouble, sha256="", missing=False,
            added=datetime.fromtimestamp(mtime / 1e9, UTC),
        )  # fmt: skip

    def paths_of_hash(self, start: str) -> list[Path]:
        """Where files lie whose hash begins with `start`."""
        rows = self._session.scalars(select(FileRow).where(FileRow.sha256.startswith(start, autoescape=True)))
        return [row.where for row in rows if row.where.exists()] if start else []

    # Telling

    def describe(self, path: Path, **said: Any) -> Entry:
        """Note what the user says of the model at `path`: fields of About, each in place of what was there.

        The model is hashed for it, if it was not yet. Raises RequestError for values out of range, FileError.
        """
        row = self._session.get(FileRow, os.fsencode(path))
        if row is None:
            raise RequestError("model", f"{path} is not in the library; `gouache models add` its folder")
        about = replace(self._about(row), **said)
        if not row.sha256:
            row.sha256 = _digest(row.where, self._settings)
        kept = self._session.get(AboutRow, row.sha256) or AboutRow(sha256=row.sha256)
        for name, value in asdict(about).items():
            setattr(kept, name, list(value) if isinstance(value, tuple) else value)
        self._session.add(kept)
        self._session.commit()
        return self._entry(row)

    def forget(self, paths: Iterable[Path]) -> None:
        """Drop these rows; what was said of the models is kept, for when they come again."""
        for path in paths:
            if (row := self._session.get(FileRow, os.fsencode(path))) is not None:
                self._session.delete(row)
        self._session.commit()

    def _rows(self) -> dict[bytes, FileRow]:
        return {row.path: row for row in self._session.scalars(select(FileRow))}

    def _about(self, row: FileRow) -> About:
        kept = self._session.get(AboutRow, row.sha256) if row.sha256 else None
        if kept is None:
            return About()
        values = {each.name: getattr(kept, each.name) for each in fields(About)}
        return About(**_tuples(values))

    def _entry(self, row: FileRow) -> Entry:
        return Entry(
            path=row.where, names=tuple(row.names), size=row.size, place=row.place, kind=row.kind, family=row.family,
            facts=row.facts, sidecar=Sidecar(**_tuples(row.sidecar)), about=self._about(row), trouble=row.trouble,
            sha256=row.sha256, missing=row.missing, added=row.added.replace(tzinfo=UTC),
        )  # fmt: skip


def _measure(path: Path) -> tuple[int, int]:
    """(bytes, newest change) of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    stats = [each.stat() for each in files]
    return sum(each.st_size for each in stats), max((each.st_mtime_ns for each in stats), default=0)


def _hub_hash(path: Path) -> str:
    """In the Hugging Face cache a large file is called by its SHA-256, and its name in a snapshot is a link to it."""
    real = path.resolve()
    name = real.name
    return name if real.parent.name == "blobs" and len(name) == 64 and set(name) <= set("0123456789abcdef") else ""


def _digest(path: Path, settings: Settings) -> str:
    return sha256(open_model(path), settings) if path.is_dir() else sha256_of(path, settings)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """As our own records have them: JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _as_json(sidecar: Sidecar) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(sidecar).items()}


def _set(row: FileRow, **values: Any) -> None:
    """Only what differs, so that a look that finds nothing new writes nothing."""
    for name, value in values.items():
        if getattr(row, name, None) != value:
            setattr(row, name, value)


def _everything(entry: Entry) -> str:
    said = entry.said
    texts = [
        *entry.names, str(entry.path), entry.kind, entry.family, entry.sha256, said.title, *said.tags, said.notes,
        *said.trigger_words, said.base, said.use, entry.sidecar.description,
        *(str(value) for value in entry.facts.values()),
    ]  # fmt: skip
    return "\n".join(texts).casefold()
