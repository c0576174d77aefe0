"""The library: which models there are, what each is, and what the user noted about them. SQLite, `library.sqlite`.

`refresh` searches all folders and reads the headers of new files: milliseconds per file. `hash_next` reads whole files,
one per call, and can run in the background (`app.indexing`). A file that was moved or renamed is recognised by its
hash. Model files are never changed.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.dialects.sqlite import insert

from gouache.app import sidecars
from gouache.app.categories import category
from gouache.app.entry import About, Entry, read_header
from gouache.app.hashes import hashes, sha256, sha256_of
from gouache.app.rows import (
    ABOUT,
    FILE,
    Row,
    about_at,
    about_of,
    entry_of,
    find_row,
    is_lora,
    row_of,
    storable,
    with_lists,
    write_rows,
)
from gouache.app.search_paths import Candidate, candidates
from gouache.app.settings import DATABASE, Settings
from gouache.app.tables import Database
from gouache.errors import FileError, GouacheError, RequestError, printable
from gouache.files.open import open_model
from gouache.outside import open_outside

OnWork = Callable[[str, int, int], None]

_BATCH = 200  # rows written at once: so much is lost if a refresh is stopped
_INTEGERS = 1 << 63  # SQLite's are smaller
_MAX_SEARCH = 50_000_000_000  # bytes read at most to find one hash


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
        self._database = Database(path)

    @classmethod
    def of(cls, settings: Settings) -> Library:
        return cls(settings.data / DATABASE, settings)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def refresh(self, on_work: OnWork | None = None) -> Changes:
        """Search all folders; read the headers of new and changed files, and the sidecar files of all.

        What was found is stored after every 200 files, so that a refresh that was stopped goes on where it was. Raises
        FileError if the database cannot be written, or a list of folders cannot be read.
        """
        changes, rows = Changes(), self._rows()
        found, pending = list(candidates(self._settings)), list[Row]()
        folders = _Folders()
        present = set[bytes]()
        for number, candidate in enumerate(found):
            if on_work is not None:
                on_work("searching", number, len(found))
            key = os.fsencode(candidate.path)
            present.add(key)
            row = self._updated(key, candidate, rows.get(key), folders, changes)
            if row is not None and row != rows.get(key):
                rows[key] = row
                pending.append(row)
                if len(pending) >= _BATCH:
                    self._store(pending)
                    pending = []
        self._store(pending)
        gone = [row for key, row in rows.items() if key not in present and not row.missing]
        changes.gone += [row.location for row in gone]
        if gone:
            with self._database.writing() as connection:
                for row in gone:
                    rows[row.path] = replace(row, missing=True)
                    connection.execute(update(FILE).where(FILE.c.path == row.path).values(missing=True))
        self._detect_moved(rows, changes)
        return changes

    def _updated(
        self, key: bytes, candidate: Candidate, row: Row | None, folders: _Folders, changes: Changes
    ) -> Row | None:
        """The row of a file as it is now; None for one that was deleted since it was listed, or is not readable."""
        path = candidate.path
        try:
            size, mtime = _size_and_mtime(path)
        except OSError:
            return None
        if row is None or (row.size, row.mtime_ns) != (size, mtime):
            (changes.new if row is None else changes.changed).append(path)
            kind, family, facts, error = read_header(path)
            row = replace(
                row or Row(key), size=size, mtime_ns=mtime, sha256=_hub_hash(path), autov3=None, kind=kind,
                family=family, facts=storable(facts), error=error,
            )  # fmt: skip
        left_at = str(row.sidecar.get("left_at", ""))
        sidecar = sidecars.read(path, folders.names(path.parent), Path(left_at) if left_at else None)
        return replace(
            row, names=list(candidate.names), folder_category=candidate.category, missing=False,
            sidecar=storable(with_lists(sidecar)),
        )  # fmt: skip

    def _store(self, rows: list[Row]) -> None:
        if not rows:
            return
        with self._database.writing() as connection:
            write_rows(connection, rows)

    def _detect_moved(self, rows: dict[bytes, Row], changes: Changes) -> None:
        """Hash the new files that have the size of a missing one: they may be the same file under another name."""
        missing_sizes = {row.size for row in rows.values() if row.missing and row.sha256}
        for path in changes.new:
            row = rows[os.fsencode(path)]
            if row.size in missing_sizes:
                self._hash(row, changes)

    def hash_next(self) -> Entry | None:
        """Compute the hash of one file that has none; None if all have one. Raises FileError."""
        row = next((row for row in self._rows().values() if _wants_hash(row)), None)
        return None if row is None else self.entry(self._hash(row, Changes()).location)

    @property
    def unhashed(self) -> tuple[int, int]:
        """(files, bytes) that `hash_next` still has to read."""
        rows = [row for row in self._rows().values() if _wants_hash(row)]
        return len(rows), sum(row.size for row in rows)

    def store_hash(self, path: Path, sha256: str) -> None:
        """Store a hash that was computed elsewhere."""
        with self._database.writing() as connection:
            connection.execute(update(FILE).where(FILE.c.path == os.fsencode(path)).values(sha256=sha256))

    def _hash(self, row: Row, changes: Changes) -> Row:
        """`row` with its hashes, or the reason why it has none. Rows of missing files with that hash are removed."""
        try:
            sha256, autov3 = _digests(row, self._settings)
        except (GouacheError, OSError) as error:
            row = replace(row, error=printable(str(error), 400))
            self._store([row])
            return row
        row = replace(row, sha256=sha256, autov3=autov3)
        with self._database.writing() as connection:
            same = select(FILE).where(FILE.c.sha256 == sha256, FILE.c.missing, FILE.c.path != row.path)
            for found in connection.execute(same).mappings().all():
                before = row_of(found)
                changes.moved.append((before.location, row.location))
                row = replace(row, added=before.added, sidecar=self._left_behind(before, row))
                connection.execute(delete(FILE).where(FILE.c.path == before.path))
            write_rows(connection, [row], hashed=True)
        return row

    def _left_behind(self, before: Row, row: Row) -> dict[str, Any]:
        """The sidecar values of a moved file: of the files next to it, or else of those that stayed where it was."""
        if row.sidecar.get("files"):
            return row.sidecar
        left_at = Path(str(before.sidecar.get("left_at") or before.location))
        return storable(with_lists(sidecars.read(row.location, None, left_at)))

    def entries(self, kind: str = "", family: str = "", tag: str = "", missing: bool = False) -> list[Entry]:
        """Models in name order; only those of a `kind` or category, `family` or `tag`. `missing`: the deleted ones."""
        wanted = _folded(tag)
        kept = [
            each
            for each in self._entries()
            if each.missing == missing
            and (not kind or kind in (each.category, each.kind))
            and (not family or each.family == family)
            and (not tag or wanted in map(_folded, each.details.tags))
        ]
        return sorted(kept, key=lambda each: (each.name.casefold(), str(each.path)))

    def find(self, words: str) -> list[Entry]:
        """Models for which every word occurs in a name, title, tag, note, description, trigger word or other text."""
        wanted = _folded(words).split()
        return [each for each in self.entries() if all(word in _all_text(each) for word in wanted)]

    def entry(self, path: Path) -> Entry | None:
        """The model at `path`; None if it is not in the library."""
        with self._database.reading() as connection:
            row = find_row(connection, path)
            return None if row is None else entry_of(row, about_at(connection, row.sha256))

    def read_entry(self, path: Path) -> Entry:
        """An entry for a model that is in no folder of the library, from its header and sidecar files. Not stored.

        Raises FileError if it does not exist or cannot be read.
        """
        try:
            size, mtime = _size_and_mtime(path)
        except OSError as error:
            raise FileError(path, f"cannot be read: {error.strerror}") from None
        kind, family, facts, error = read_header(path)
        return Entry(
            path=path, names=tuple(dict.fromkeys((path.stem, path.name))), size=size, folder_category="", kind=kind,
            family=family, facts=facts, sidecar=sidecars.read(path), about=About(), error=error, sha256="",
            missing=False, added=_time(mtime),
        )  # fmt: skip

    def paths_of_hash(self, start: str) -> list[Path]:
        """The existing files of which the SHA-256 or AutoV3, as stored, begins with `start`."""
        if not start:
            return []
        columns = (FILE.c.sha256.startswith(start, autoescape=True), FILE.c.autov3.startswith(start, autoescape=True))
        with self._database.reading() as connection:
            found = [row_of(each).location for each in connection.execute(select(FILE).where(or_(*columns))).mappings()]
        return [path for path in found if _exists(path)]

    def find_hash(self, digest: str, kind: str = "") -> Path | None:
        """The file with this hash among those that were never hashed; they are hashed until it is found.

        `kind`, if given, is the category in which to look first. AutoV1 (8 digits) is read of all files: it takes
        64 KiB of each. At most 50 GB are read for the other hashes.
        """
        rows = [row for row in self._rows().values() if not row.missing and not row.error]
        if len(digest) == 8:
            for row in rows:
                if _autov1(row.location) == digest:
                    return row.location
        left = _MAX_SEARCH
        for row in sorted((row for row in rows if not row.hashed), key=lambda row: (_category(row) != kind, row.size)):
            left -= row.size
            if left < 0:
                return None
            row = self._hash(row, Changes())
            if row.sha256.startswith(digest) or (row.autov3 or "").startswith(digest):
                return row.location
        return None

    def describe(
        self, path: Path, *, add_tags: Iterable[str] = (), remove_tags: Iterable[str] = (), **values: Any
    ) -> Entry:
        """Store what the user notes about the model at `path`: fields of About, which replace their former values.

        Tags can also be added and removed, so that two processes can do that at once. If the model has no hash yet, it
        is computed. Raises RequestError for values out of range, FileError.
        """
        with self._database.reading() as connection:
            row = find_row(connection, path)
        if row is None:
            shown = printable(str(path))
            raise RequestError("model", f"{shown} is not in the library; add its folder with `gouache models add`")
        replace(About(), **values)  # checked before gigabytes are hashed
        if not row.sha256:
            digest = _digests(row, self._settings)[0]
            self.store_hash(path, digest)
            row = replace(row, sha256=digest)
        with self._database.writing() as connection:
            about = replace(about_at(connection, row.sha256), **values)
            removed = set(remove_tags)
            tags = [each for each in (*about.tags, *add_tags) if each not in removed]
            about = replace(about, tags=tuple(dict.fromkeys(tags)))
            new = insert(ABOUT).values(sha256=row.sha256, **storable(with_lists(about)))
            changed = {each.name: new.excluded[each.name] for each in fields(About)}
            connection.execute(new.on_conflict_do_update(index_elements=["sha256"], set_=changed))
        return entry_of(row, about)

    def forget(self, paths: Iterable[Path]) -> None:
        """Delete the rows of these files. The user's notes are kept, in case the models are added again."""
        with self._database.writing() as connection:
            for path in paths:
                connection.execute(delete(FILE).where(FILE.c.path == os.fsencode(path)))

    def _rows(self) -> dict[bytes, Row]:
        with self._database.reading() as connection:
            rows = map(row_of, connection.execute(select(FILE)).mappings())
            return {row.path: row for row in rows}

    def _entries(self) -> Iterator[Entry]:
        with self._database.reading() as connection:
            rows = [row_of(each) for each in connection.execute(select(FILE)).mappings()]
            abouts = {each["sha256"]: about_of(each) for each in connection.execute(select(ABOUT)).mappings()}
        for row in rows:
            yield entry_of(row, abouts.get(row.sha256, About()) if row.sha256 else About())


class _Folders:
    """The names of the files in each folder, listed once."""

    def __init__(self) -> None:
        self._names = dict[Path, frozenset[str]]()

    def names(self, folder: Path) -> frozenset[str]:
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))  # noqa: PTH208 - names, thousands of them
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]


def _wants_hash(row: Row) -> bool:
    return not row.hashed and not row.missing and not row.error


def _category(row: Row) -> str:
    return category(row.kind) if row.kind not in ("", "unknown") else row.folder_category


def _size_and_mtime(path: Path) -> tuple[int, int]:
    """(bytes, newest modification time in ns) of a file, or of all files in a folder. Raises OSError."""
    try:
        status = path.stat()
    except OSError:
        status = path.lstat()  # a link to nothing, or to itself, is listed with the reason why it cannot be opened
    stats = [status]
    if stat.S_ISDIR(status.st_mode):
        stats = [each.stat() for each in path.rglob("*") if each.is_file()]
    elif not stat.S_ISREG(status.st_mode):
        return 0, 0
    newest = max((each.st_mtime_ns for each in stats), default=0)
    return sum(each.st_size for each in stats), max(-_INTEGERS, min(newest, _INTEGERS - 1))


def _time(mtime_ns: int) -> datetime:
    try:
        return datetime.fromtimestamp(mtime_ns / 1e9, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _hub_hash(path: Path) -> str:
    """In the Hugging Face cache a large file is named by its SHA-256, and the snapshot contains a link to it."""
    try:
        real = path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):  # a link to itself
        return ""
    name = real.name
    return name if real.parent.name == "blobs" and len(name) == 64 and set(name) <= set("0123456789abcdef") else ""


def _digests(row: Row, settings: Settings) -> tuple[str, str | None]:
    """(SHA-256, AutoV3); the second only of LoRAs: it takes a second pass. Raises FileError."""
    path = row.location
    if path.is_dir():
        return sha256(open_model(path), settings), "" if is_lora(row.kind) else None
    if is_lora(row.kind):
        every = hashes(path, settings)
        return every.sha256, every.autov3
    return sha256_of(path, settings), None


def _autov1(path: Path) -> str:
    """A1111's first hash: 8 digits of the SHA-256 of 64 KiB at offset 1 MiB."""
    try:
        with open_outside(path) as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    except (FileError, OSError):
        return ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _all_text(entry: Entry) -> str:
    details = entry.details
    texts = [
        *entry.names, str(entry.path), entry.kind, entry.family, entry.sha256, details.title, *details.tags,
        details.notes, *details.trigger_words, details.base, details.use, entry.sidecar.description,
        *(str(value) for value in entry.facts.values()),
    ]  # fmt: skip
    return _folded("\n".join(texts))
