"""The library's database: two tables of SQLite, made and brought up to date by the migrations beside this file.

file    what lies where: a row a path; what is known of it from its header and the files beside it, and its hash
about   what the user said of a model: a row a hash, so that it follows a file that is moved, renamed or copied
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Engine, Float, LargeBinary, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from gouache.errors import FileError

HEAD = "0002"  # the newest of migrations/versions
_MIGRATIONS = Path(__file__).with_name("migrations")


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 - SQLAlchemy reads it so


class FileRow(Base):
    """A model file or folder. `path` is in the file system's own bytes, which need not be text."""

    __tablename__ = "file"

    path: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    names: Mapped[list[str]]
    size: Mapped[int]
    mtime_ns: Mapped[int]
    place: Mapped[str]  # the kind that its folder is for
    kind: Mapped[str]
    family: Mapped[str]
    facts: Mapped[dict[str, Any]]
    sidecar: Mapped[dict[str, Any]]
    trouble: Mapped[str]  # why it cannot be opened
    sha256: Mapped[str] = mapped_column(index=True)  # "" until it is computed
    missing: Mapped[bool]
    added: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))  # in UTC

    @property
    def where(self) -> Path:
        return Path(os.fsdecode(self.path))


class AboutRow(Base):
    """What the user said of the model with this hash; "" or [] or None where nothing."""

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
    vae: Mapped[str] = mapped_column(default="")  # the path of the autoencoder to paint it with


def connect(path: Path) -> Engine:
    """The database at `path`, made or brought up to date. Raises FileError where it cannot be used."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        event.listen(engine, "connect", _prepare)
        _migrate(engine, path)
    except OSError as error:
        raise FileError(path, f"cannot be made: {error.strerror}") from None
    except DatabaseError as error:
        raise FileError(path, f"cannot be used ({error.orig}); move it away, and a new library is made") from None
    return engine


def _prepare(connection: Any, _: Any) -> None:
    """Readers do not wait for the writer, and a power cut loses at most the last sentence."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _migrate(engine: Engine, path: Path) -> None:
    with engine.begin() as connection:
        has = inspect(connection).has_table("alembic_version")
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if has else None
    if found == HEAD:
        return
    if found is not None and not (_MIGRATIONS / "versions" / f"v{found}.py").is_file():
        raise FileError(path, f"is of a newer Gouache (version {found} of its tables, this one knows {HEAD}); update")
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
