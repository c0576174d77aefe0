"""Captions and scores of many pictures in one file: Hugging Face's `metadata.jsonl` and `.csv`, kohya's JSON and JSONL.

    metadata.jsonl       {"file_name": "a.png", "text": "a cat", "aesthetic": 5.5}   one object per line
    metadata.csv         file_name,text,aesthetic
    kohya's JSONL        {"image_path": "/data/a.png", "caption": "a cat", "tags": "cat, mat"}
    kohya's JSON         {"a": {"caption": "a cat", "tags": "cat, mat"}}             by path, or name without suffix

A picture is looked up by its name among the listed files: what the file says cannot lead out of its folder.
"""

from __future__ import annotations

import csv
import io
import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gouache.data.listing import Folder, caption_lines, is_picture, some
from gouache.data.record import Record
from gouache.data.subset import Subset
from gouache.errors import FileError, printable
from gouache.outside import MalformedText, parse_json, read_text
from gouache.wording import plural

NAMES = ("metadata.jsonl", "metadata.csv")
SUFFIXES = (".json", ".jsonl", ".csv")

_FILE_COLUMNS = ("file_name", "image_path", "image_file_name", "image", "path", "file")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
_MASK_COLUMNS = ("mask_file_name", "mask")
_CONDITIONING_COLUMNS = ("conditioning_image_file_name", "conditioning_image", "control_file_name", "control")
_MAX_BYTES = 500_000_000

Row = tuple[str, Mapping[str, Any]]
"""(where it is in the file, its values)"""


def read(
    path: Path, listed: Sequence[Folder], root: Path, subset: Subset, caption_column: str = ""
) -> tuple[list[Record], list[str]]:
    """The records of the pictures in the metadata file `path`, and notes.

    `listed` are the folders with the pictures, the first of which is the one that names in the file are relative to.
    `caption_column`: "" for one of the usual names. Raises FileError.
    """
    pictures = _Pictures(path, listed, root)
    rows = list(_rows(path))
    columns = dict.fromkeys(key for _, values in rows for key in values)
    if caption_column and caption_column not in columns:
        raise FileError(path, f"has no column {printable(caption_column)!r}; it has {some(list(columns), 20)}")
    column = caption_column or next((name for name in CAPTION_COLUMNS if name in columns), "")
    records, missing, notes = list[Record](), list[str](), list[str]()
    for where, values in rows:
        name = _first_text(path, where, values, _FILE_COLUMNS)
        if name is None:
            raise FileError(path, f"{where}: has no picture; expected a column {' or '.join(_FILE_COLUMNS[:2])}")
        picture = pictures.find(where, name)
        if picture is None:
            missing.append(name)
            continue
        mask, conditioning = (
            pictures.second(where, _first_text(path, where, values, names))
            for names in (_MASK_COLUMNS, _CONDITIONING_COLUMNS)
        )
        tags = None if column and not (path.suffix.lower() == ".json" or "image_path" in values) else values.get("tags")
        lines = captions_of(path, where, values.get(column), tags)
        others = {key: value for key, value in values.items() if key not in (*_FILE_COLUMNS, column)}
        scores = {key: score for key, value in others.items() if (score := score_of(value)) is not None}
        records.append(subset.record(picture, pictures.name(picture), lines, mask, conditioning, scores))
    if missing and not records:
        raise FileError(path, f"names {plural(len(missing), 'picture')}, and none is there: {some(missing)}")
    if missing:
        notes.append(
            f"{printable(path.name)}: {len(missing)} of {plural(len(rows), 'picture')} missing: {some(missing)}"
        )
    if rows and not column and "tags" not in columns:
        expected = f"has no column {', '.join(CAPTION_COLUMNS[:2])} or tags; name it with --caption-column"
        notes.append(f"{printable(path.name)} {expected}; it has {some(list(columns), 20)}")
    return records, notes


class _Pictures:
    """Looks up the names in a metadata file."""

    def __init__(self, path: Path, listed: Sequence[Folder], root: Path) -> None:
        self._path, self._root = path, root
        self._base = listed[0].path
        self._by_name, self._by_stem = dict[str, Path](), dict[str, Path]()
        for folder in listed:
            for name in filter(is_picture, folder.names):
                inner = (folder.path / name).relative_to(self._base)
                self._by_name[inner.as_posix()] = folder.path / name
                self._by_stem.setdefault(inner.with_suffix("").as_posix(), folder.path / name)

    def find(self, where: str, name: str) -> Path | None:
        """The picture called `name`; None if there is none. Raises FileError for a name outside the folder."""
        plain = posixpath.normpath(name.replace("\\", "/"))
        if PurePosixPath(plain).is_absolute() or plain[1:2] == ":":  # kohya's full paths
            bases = (self._base.absolute().as_posix(), self._base.resolve().as_posix())
            base = next((each for each in bases if plain.startswith(f"{each}/")), "")
            plain = plain.removeprefix(f"{base}/") if base else f"../{plain}"
        if plain.split("/")[0] == "..":
            folder = printable(str(self._base))
            raise FileError(
                self._path, f"{where}: names {printable(name)!r}, which is outside the folder {folder}; move it there"
            )
        return self._by_name.get(plain) or self._by_stem.get(plain)

    def second(self, where: str, name: str | None) -> Path | None:
        """The picture that belongs to another one, if it has a `name`. Raises FileError if there is none."""
        found = self.find(where, name) if name else None
        if name and found is None:
            raise FileError(
                self._path, f"{where}: there is no picture {printable(name)} in {printable(str(self._base))}"
            )
        return found

    def name(self, picture: Path) -> str:
        return picture.relative_to(self._root).as_posix()


def parsed(path: Path) -> Any:
    """The values in a JSON file; None for a folder. Raises FileError."""
    return None if path.is_dir() else _parsed(path, read_text(path, _MAX_BYTES), "")


def _rows(path: Path) -> Iterator[Row]:
    text = read_text(path, _MAX_BYTES)
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
    elif path.suffix.lower() == ".json":
        yield from _json_rows(path, _parsed(path, text, ""))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"line {number}"
                yield where, _table(path, where, _parsed(path, line, f"{where}: "))


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for values in rows:
            yield f"line {rows.line_num}", {key: value for key, value in values.items() if key is not None}
    except csv.Error as error:
        raise FileError(path, f"line {rows.line_num}: is not CSV: {printable(str(error))}") from None


def _json_rows(path: Path, value: Any) -> Iterator[Row]:
    if isinstance(value, dict):  # kohya's
        for key, values in value.items():
            where = f"entry {printable(key, 60)!r}"
            yield where, {**_table(path, where, values), "file_name": key}
    elif isinstance(value, list):
        for number, values in enumerate(value, 1):
            yield f"entry {number}", _table(path, f"entry {number}", values)
    else:
        raise FileError(path, f"contains {_kind(value)}; expected an object with one entry per picture")


def _parsed(path: Path, text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except MalformedText as error:
        raise FileError(path, f"{where}{error}") from None


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FileError(path, f"{where}: contains {_kind(value)}; expected an object with file_name and text")
    return value


def _first_text(path: Path, where: str, values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the columns `names` that is there and not empty."""
    for name in names:
        value = values.get(name)
        if value in (None, ""):
            continue
        if not isinstance(value, str) or "\0" in value:
            found = "has NUL characters" if isinstance(value, str) else f"is {_kind(value)}"
            raise FileError(path, f"{where}: {name} {found}; expected the name of a picture")
        return value
    return None


def captions_of(path: Path, where: str, caption: Any, tags: Any) -> tuple[str, ...] | None:
    """The lines of the caption, which may be a list, with kohya's tags behind each; None if there is neither."""
    texts = caption if isinstance(caption, list) else [caption]
    if isinstance(tags, list):
        tags = ", ".join(map(str, tags))
    for text in (*texts, tags):
        if not isinstance(text, str | None):
            raise FileError(path, f"{where}: the caption is {_kind(text)}; expected text")
    lines = [line for text in texts if text is not None for line in caption_lines(text, path, f"{where}: ")]
    if tags:
        tags = " ".join(caption_lines(tags, path, f"{where}: "))
        lines = [", ".join(filter(None, (line, tags))) for line in lines or [""]]
    return tuple(lines) or None


def score_of(value: Any) -> float | None:
    """The number that a column has, in CSV as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "null")
