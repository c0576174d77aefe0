"""Reads the metadata files that other programs store next to a model file. They are never written.

For NAME.safetensors; of the same value in several files the later one in this list is used:

    NAME.txt, NAME.description.txt    a description
    NAME.metadata.json                from ComfyUI's LoRA manager
    NAME.civitai.info                 Civitai's record of this model version, saved by Civitai Helper
    NAME.json                         what the user entered in A1111: activation text, preferred weight, notes, ...
    NAME.yaml                         A1111's network configuration
    NAME.preview.png, NAME.png, ...   a preview picture
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gouache.errors import printable

PREVIEWS = tuple(
    f"{middle}{suffix}" for middle in (".preview", "") for suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif")
)
_MAX_BYTES = 4_000_000  # larger files hold previews embedded in JSON and are not read
_MAX_TEXT = 20_000


@dataclass(frozen=True)
class Sidecar:
    """The combined values; "", () or None where no file has one. `sha256` in lower case. `files`: those read."""

    title: str = ""
    description: str = ""
    notes: str = ""
    base: str = ""
    trigger_words: tuple[str, ...] = ()
    negative: str = ""
    weight: float | None = None
    tags: tuple[str, ...] = ()
    source: str = ""
    sha256: str = ""
    preview: str = ""
    config: str = ""
    files: tuple[str, ...] = ()


def read(model: Path) -> Sidecar:
    """Read all sidecar files of `model`; files that cannot be read are skipped."""
    values: dict[str, Any] = {}
    files = list[str]()
    stem = model if model.is_dir() else model.with_suffix("")
    for suffix, reader in _READERS.items():
        path = stem.with_name(stem.name + suffix)
        found = {key: value for key, value in reader(path) if value not in ("", (), None)}
        if found:
            files.append(path.name)
            values.update(found)
    for name, suffixes in (("preview", PREVIEWS), ("config", (".yaml",))):
        paths = (stem.with_name(stem.name + suffix) for suffix in suffixes)
        if (path := next((path for path in paths if path != model and path.is_file()), None)) is not None:
            values[name] = str(path)
            files.append(path.name)
    return Sidecar(**values, files=tuple(files))


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    if (text := _read_text(path)) is not None:
        yield "description", _plain_text(text)


def _civitai(path: Path) -> Iterator[tuple[str, Any]]:
    yield from _civitai_version(_read_json(path))


def _civitai_version(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model = record.get("model") if isinstance(record.get("model"), dict) else {}
    assert isinstance(model, dict)
    name, version = _plain_text(model.get("name")), _plain_text(record.get("name"))
    yield "title", f"{name} {version}".strip()
    yield "description", _plain_text(record.get("description")) or _plain_text(model.get("description"))
    yield "base", _plain_text(record.get("baseModel"))
    yield "trigger_words", _texts(record.get("trainedWords"))
    yield "tags", _texts(model.get("tags"))
    if isinstance(number := record.get("modelId"), int):
        yield "source", f"https://civitai.com/models/{number}"
    files = record.get("files")
    hashes = [each.get("hashes") for each in files if isinstance(each, dict)] if isinstance(files, list) else []
    if len(hashes) == 1 and isinstance(hashes[0], dict):  # of several files it is unknown which one this is
        yield "sha256", _plain_text(hashes[0].get("SHA256")).lower()


def _lora_manager(path: Path) -> Iterator[tuple[str, Any]]:
    record = _read_json(path)
    if isinstance(civitai := record.get("civitai"), dict):
        yield from _civitai_version(civitai)
    yield "title", _plain_text(record.get("model_name"))
    yield "base", _plain_text(record.get("base_model"))
    yield "tags", _texts(record.get("tags"))
    yield "description", _plain_text(record.get("modelDescription"))
    yield "notes", _plain_text(record.get("notes"))
    yield "sha256", _plain_text(record.get("sha256")).lower()


def _a1111(path: Path) -> Iterator[tuple[str, Any]]:
    record = _read_json(path)
    yield "description", _plain_text(record.get("description"))
    yield "notes", _plain_text(record.get("notes"))
    base = _plain_text(record.get("sd version"))
    yield "base", "" if base == "Unknown" else base
    text = _plain_text(record.get("activation text"))
    yield "trigger_words", tuple(filter(None, (part.strip() for part in text.split(","))))
    yield "negative", _plain_text(record.get("negative text"))
    weight = record.get("preferred weight")
    # A1111 writes 0 if the user has not set a weight.
    yield "weight", float(weight) if isinstance(weight, int | float) and weight and abs(weight) < 100 else None


_READERS = {
    ".txt": _text,
    ".description.txt": _text,
    ".metadata.json": _lora_manager,
    ".civitai.info": _civitai,
    ".json": _a1111,
}


def _read_text(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _plain_text(value: object) -> str:
    """`value` as text that can be printed: without HTML, which Civitai uses, and without control characters."""
    if not isinstance(value, str):
        return ""
    text = value[:_MAX_TEXT]
    if "<" in text and ">" in text:
        parser = _HtmlText()
        parser.feed(text)
        text = "".join(parser.parts)
    lines = (printable(" ".join(line.split()), _MAX_TEXT) for line in text.splitlines())
    return "\n".join(filter(None, lines))


def _texts(value: object) -> tuple[str, ...]:
    return tuple(filter(None, (_plain_text(each) for each in value))) if isinstance(value, list) else ()


class _HtmlText(HTMLParser):
    """The text of a piece of HTML; a paragraph, break or list item begins a new line."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = list[str]()

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "br", "li", "div"):
            self.parts.append("\n")
