"""The library's SQLite database: two tables, created and upgraded by the migrations in this folder.

file    one row per path: the file, what its header and sidecar files contain, and its hashes
about   one row per hash: what the user noted about the model, so that it follows a file that is moved or copied

Several processes may use it at once: every change is a short transaction that waits for others ("BEGIN IMMEDIATE").
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Float,
    LargeBinary,
    QueuePool,
    TypeDecorator,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from gouache.app.cache import make_private
from gouache.errors import FileError, printable
from gouache.outside import MalformedText, parse_json

HEAD = "0003"  # the newest revision in migrations/versions
WAIT = 30.0  # seconds to wait for another process that writes
_MIGRATIONS = Path(__file__).with_name("migrations")


class _Time(TypeDecorator[datetime]):
    """A time, None where the database has something else."""

    impl = DateTime
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        read = self.impl_instance.result_processor(dialect, coltype)

        def process(value: Any) -> datetime | None:
            try:
                return read(value) if read is not None and value is not None else value
            except (ValueError, TypeError):
                return None

        return process


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON, datetime: _Time}  # noqa: RUF012 - SQLAlchemy's form


class FileRow(Base):
    """A model file or folder. `path` is in the bytes of the file system, which need not be valid text."""

    __tablename__ = "file"

    path: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    names: Mapped[list[str]]
    size: Mapped[int]
    mtime_ns: Mapped[int]
    folder_category: Mapped[str] = mapped_column("place")  # the category that its folder is meant for
    kind: Mapped[str]
    family: Mapped[str]
    facts: Mapped[dict[str, Any]]
    sidecar: Mapped[dict[str, Any]]
    error: Mapped[str] = mapped_column("trouble")  # why it cannot be opened
    sha256: Mapped[str] = mapped_column(index=True)  # "" until it is computed
    missing: Mapped[bool]
    added: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))  # in UTC
    autov3: Mapped[str | None] = mapped_column(index=True)  # of LoRAs; None until it is computed, "" if there is none


class AboutRow(Base):
    """What the user noted about the model with this hash; "", [] or None where nothing."""

    __tablename__ = "about"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(default="")
    tags: Mapped[list[str]] = mapped_column(default=list)
    notes: Mapped[str] = mapped_column(default="")
    trigger_words: Mapped[list[str]] = mapped_column(default=list)
    negative: Mapped[str] = mapped_column(default="")
    weight: Mapped[float | None] = mapped_column(Float, default=None)
    base: Mapped[str] = mapped_column(default="")
    use: Mapped[str] = mapped_column(default="")
    source: Mapped[str] = mapped_column(default="")  # where it was installed from
    vae: Mapped[str] = mapped_column(default="")  # the path of the VAE to paint it with


class Database:
    """An open database. `reading` and `writing` are one transaction each; both raise FileError."""

    def __init__(self, path: Path) -> None:
        """Opens the database at `path`; it is created or upgraded if necessary. Raises FileError."""
        self.path = path
        self.engine = _engine(path)
        try:
            make_private(path.parent)
            if not path.exists() and not path.is_symlink():
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # private: see `make_private`
            if path.exists() and not path.is_file():
                raise FileError(path, "is not a regular file; move it away, and a new library is created")
        except OSError as error:
            raise FileError(path, f"cannot be created: {error.strerror}") from None
        with self._explained():
            _migrate(self.engine, path)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._explained(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with self._explained(), self.engine.execution_options(write=True).begin() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            raise FileError(self.path, _reason(self.path, error)) from None


def _engine(path: Path) -> Engine:
    def open_database() -> sqlite3.Connection:
        # Not by URL, in which "?" and "%" have a meaning. Transactions are begun by `_begin`, not by sqlite3.
        return sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)

    engine = create_engine("sqlite://", creator=open_database, poolclass=QueuePool, json_deserializer=_parse)
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _parse(column: object) -> Any:
    """A damaged value is None, so that one row does not hide all others."""
    try:
        return parse_json(column) if isinstance(column, str | bytes) else None
    except MalformedText:
        return None


def _begin(connection: Connection) -> None:
    # Without IMMEDIATE a transaction that has read cannot write any more once another process has written.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")


def _set_pragmas(connection: Any, _: Any) -> None:
    """With WAL, readers do not wait for the writer; with NORMAL, a power failure loses at most the last transaction."""
    with suppress(sqlite3.OperationalError):  # read-only, or another process is setting it
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _reason(path: Path, error: DatabaseError) -> str:
    """What is wrong, from SQLite's result code. Only a damaged database should be moved away: it has the notes."""
    code = getattr(error.orig, "sqlite_errorcode", None) or 0
    message = printable(str(error.orig))
    primary = code & 0xFF
    try:
        full = shutil.disk_usage(path.parent).free < 1_000_000
    except OSError:
        full = False
    if primary == sqlite3.SQLITE_FULL or (full and primary in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)):
        return "cannot be written: the disk is full; free some space (the database itself is sound)"
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return "cannot be written: it or its folder is read-only; allow writing (the database itself is sound)"
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process has been writing to it for {WAIT:.0f} s; try again when that has ended"
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return f"is damaged ({message}); move it away and keep it, since it has your notes: a new library is created"
    return f"cannot be used ({message}); check the permissions of its folder, the disk and its free space"


def _migrate(engine: Engine, path: Path) -> None:
    with engine.begin() as connection:
        found = _version(connection)
    if found == HEAD:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.execution_options(write=True).begin() as connection:
        found = _version(connection)  # again: another process may have done it meanwhile
        if found is not None and not (re.fullmatch("[0-9]{4}", found) and found <= HEAD):
            newer = re.fullmatch("[0-9]{4}", found)
            shown = f"database version {found}, this one supports {HEAD}" if newer else "its version is unknown"
            raise FileError(path, f"was written by a newer Gouache ({shown}); update Gouache")
        if found != HEAD:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)
