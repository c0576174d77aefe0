"""Rows of the library's tables as values, and entries made of them. What is damaged in a row is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Table, and_, case, func, select
from sqlalchemy.dialects.sqlite import insert

from gouache.app import sidecars
from gouache.app.categories import category
from gouache.app.entry import MAX_WEIGHT, USES, About, Entry
from gouache.app.sidecars import Sidecar
from gouache.app.tables import AboutRow, FileRow

FILE, ABOUT = cast(Table, FileRow.__table__), cast(Table, AboutRow.__table__)


@dataclass(frozen=True)
class Row:
    """A row of the table `file`; the fields are explained there. `size` is -1 if the row is damaged."""

    path: bytes
    names: list[str] = field(default_factory=list)
    size: int = -1
    mtime_ns: int = 0
    folder_category: str = ""
    kind: str = ""
    family: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    sidecar: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    sha256: str = ""
    missing: bool = False
    added: datetime = field(default_factory=lambda: datetime.now(UTC).replace(tzinfo=None, microsecond=0))
    autov3: str | None = None

    @property
    def location(self) -> Path:
        return Path(os.fsdecode(self.path))

    @property
    def hashed(self) -> bool:
        return bool(self.sha256) and (self.autov3 is not None or not is_lora(self.kind))


def is_lora(kind: str) -> bool:
    return category(kind) == "lora"


def write_rows(connection: Connection, rows: list[Row], hashed: bool = False) -> None:
    """Insert or replace `rows`. A hash that another process has stored meanwhile is kept, unless these are `hashed`."""
    columns = [each.name for each in fields(Row)]
    new = insert(FILE)
    excluded = new.excluded
    changed: dict[str, Any] = {_column(name): excluded[_column(name)] for name in columns if name != "path"}
    if not hashed:
        known = and_(func.typeof(FILE.c.sha256) == "text", func.length(FILE.c.sha256) == 64)
        same = and_(FILE.c.size == excluded.size, FILE.c.mtime_ns == excluded.mtime_ns, known)
        for name in ("sha256", "autov3"):
            changed[name] = case((same, FILE.c[name]), else_=excluded[name])
    statement = new.on_conflict_do_update(index_elements=["path"], set_=changed)
    connection.execute(statement, [{_column(name): getattr(row, name) for name in columns} for row in rows])


def _column(name: str) -> str:
    return {"folder_category": "place", "error": "trouble"}.get(name, name)


def find_row(connection: Connection, path: Path) -> Row | None:
    found = connection.execute(select(FILE).where(FILE.c.path == os.fsencode(path))).mappings().first()
    return None if found is None else row_of(found)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "names": list, "size": int, "mtime_ns": int, "folder_category": str, "kind": str, "family": str, "facts": dict,
    "sidecar": dict, "error": str, "sha256": str, "missing": bool, "added": datetime, "autov3": (str, type(None)),
}  # fmt: skip


def row_of(found: Mapping[Any, Any]) -> Row:
    """A row of the database. What is damaged in it is left out, and the file is read again at the next refresh."""
    path = found["path"]
    values = {name: found[_column(name)] for name in _TYPES}
    sound = {name: value for name, value in values.items() if isinstance(value, _TYPES[name])}
    if not re.fullmatch("[0-9a-f]*", sound.get("sha256", "")):
        sound["sha256"] = ""
    if not sound.get("names") or not all(isinstance(each, str) for each in sound["names"]):
        sound["names"] = [os.path.basename(os.fsdecode(path))]  # noqa: PTH119
    if len(sound) < len(_TYPES):
        sound["size"] = -1
    return Row(path if isinstance(path, bytes) else os.fsencode(str(path)), **sound)


def about_at(connection: Connection, sha256: str) -> About:
    if not sha256:
        return About()
    found = connection.execute(select(ABOUT).where(ABOUT.c.sha256 == sha256)).mappings().first()
    return About() if found is None else about_of(found)


def about_of(found: Mapping[Any, Any]) -> About:
    """Notes of the database, without what is damaged."""
    values: dict[str, Any] = {}
    for each in fields(About):
        value = found[each.name]
        if isinstance(each.default, tuple):
            values[each.name] = tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()
        elif each.name == "weight":
            sound = isinstance(value, int | float) and abs(value) <= MAX_WEIGHT
            values[each.name] = float(value) if sound else None
        elif isinstance(value, str) and (each.name != "use" or value in USES):
            values[each.name] = value
    return About(**values)


def entry_of(row: Row, about: About) -> Entry:
    return Entry(
        path=row.location, names=tuple(row.names), size=max(0, row.size), folder_category=row.folder_category,
        kind=row.kind, family=row.family, facts=row.facts, sidecar=sidecars.from_stored(row.sidecar), about=about,
        error=row.error, sha256=row.sha256, missing=row.missing, added=row.added.replace(tzinfo=UTC),
    )  # fmt: skip


def with_lists(record: Sidecar | About) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


def storable(value: Any) -> Any:
    """`value` without lone surrogates (from names that are not valid text), which SQLite cannot store."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: storable(each) for key, each in value.items()}
    return [storable(each) for each in value] if isinstance(value, list) else value
