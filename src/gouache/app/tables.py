"""The library's SQLite database: two tables, created and upgraded by the migrations in this folder.

file    one row per path: the file, what its header and sidecar files contain, and its hash
about   one row per hash: what the user noted about the model, so that it follows a file that is moved or copied
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

HEAD = "0002"  # the newest revision in migrations/versions
_MIGRATIONS = Path(__file__).with_name("migrations")


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 - SQLAlchemy requires this form


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

    @property
    def location(self) -> Path:
        return Path(os.fsdecode(self.path))


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


def connect(path: Path) -> Engine:
    """The database at `path`, created or upgraded if necessary. Raises FileError if it cannot be used."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        event.listen(engine, "connect", _set_pragmas)
        _migrate(engine, path)
    except OSError as error:
        raise FileError(path, f"cannot be created: {error.strerror}") from None
    except DatabaseError as error:
        raise FileError(path, f"cannot be used ({error.orig}); move it away, and a new library is created") from None
    return engine


def _set_pragmas(connection: Any, _: Any) -> None:
    """With WAL, readers do not wait for the writer; with NORMAL, a power failure loses at most the last transaction."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _migrate(engine: Engine, path: Path) -> None:
    with engine.begin() as connection:
        has_version = inspect(connection).has_table("alembic_version")
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if has_version else None
    if found == HEAD:
        return
    if found is not None and not (_MIGRATIONS / "versions" / f"v{found}.py").is_file():
        raise FileError(
            path, f"was written by a newer Gouache (database version {found}, this one supports {HEAD}); update Gouache"
        )
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
