"""What other programs keep beside a model file: read, never written.

For NAME.safetensors, the later ones win where they say the same thing:

    NAME.txt, NAME.description.txt    a description
    NAME.metadata.json                ComfyUI's LoRA manager
    NAME.civitai.info                 Civitai's answer on this version of the model, as Civitai Helper keeps it
    NAME.json                         what the user wrote in A1111: activation text, preferred weight, notes, ...
    NAME.yaml                         a network configuration of A1111's
    NAME.preview.png, NAME.png, ...   a picture
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
_MOST_BYTES = 4_000_000  # no text beside a model is longer; previews embedded in JSON are not read
_MOST_TEXT = 20_000


@dataclass(frozen=True)
class Sidecar:
    """What was said, each "" or () or None where nothing was. `sha256` in lower case. `files` are those it is from."""

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
    """All that lies beside `model`; what cannot be read is passed over."""
    told: dict[str, Any] = {}
    files = list[str]()
    stem = model if model.is_dir() else model.with_suffix("")
    for suffix, reader in _READERS.items():
        path = stem.with_name(stem.name + suffix)
        said = {key: value for key, value in reader(path) if value not in ("", (), None)}
        if said:
            files.append(path.name)
            told.update(said)
    for name, suffixes in (("preview", PREVIEWS), ("config", (".yaml",))):
        paths = (stem.with_name(stem.name + suffix) for suffix in suffixes)
        if (path := next((path for path in paths if path != model and path.is_file()), None)) is not None:
            told[name] = str(path)
            files.append(path.name)
    return Sidecar(**told, files=tuple(files))


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    if (text := _content(path)) is not None:
        yield "description", _words(text)


def _civitai(path: Path) -> Iterator[tuple[str, Any]]:
    yield from _civitai_version(_object(path))


def _civitai_version(told: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model = told.get("model") if isinstance(told.get("model"), dict) else {}
    assert isinstance(model, dict)
    name, version = _words(model.get("name")), _words(told.get("name"))
    yield "title", f"{name} {version}".strip()
    yield "description", _words(told.get("description")) or _words(model.get("description"))
    yield "base", _words(told.get("baseModel"))
    yield "trigger_words", _list(told.get("trainedWords"))
    yield "tags", _list(model.get("tags"))
    if isinstance(number := told.get("modelId"), int):
        yield "source", f"https://civitai.com/models/{number}"
    files = told.get("files")
    hashes = [each.get("hashes") for each in files if isinstance(each, dict)] if isinstance(files, list) else []
    if len(hashes) == 1 and isinstance(hashes[0], dict):  # of several, no one says which this is
        yield "sha256", _words(hashes[0].get("SHA256")).lower()


def _manager(path: Path) -> Iterator[tuple[str, Any]]:
    told = _object(path)
    if isinstance(civitai := told.get("civitai"), dict):
        yield from _civitai_version(civitai)
    yield "title", _words(told.get("model_name"))
    yield "base", _words(told.get("base_model"))
    yield "tags", _list(told.get("tags"))
    yield "description", _words(told.get("modelDescription"))
    yield "notes", _words(told.get("notes"))
    yield "sha256", _words(told.get("sha256")).lower()


def _a1111(path: Path) -> Iterator[tuple[str, Any]]:
    told = _object(path)
    yield "description", _words(told.get("description"))
    yield "notes", _words(told.get("notes"))
    base = _words(told.get("sd version"))
    yield "base", "" if base == "Unknown" else base
    text = _words(told.get("activation text"))
    yield "trigger_words", tuple(filter(None, (part.strip() for part in text.split(","))))
    yield "negative", _words(told.get("negative text"))
    weight = told.get("preferred weight")
    # A1111's slider stands at 0 until somebody moves it.
    yield "weight", float(weight) if isinstance(weight, int | float) and weight and abs(weight) < 100 else None


_READERS = {
    ".txt": _text,
    ".description.txt": _text,
    ".metadata.json": _manager,
    ".civitai.info": _civitai,
    ".json": _a1111,
}


def _content(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_content(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _words(value: object) -> str:
    """Text as one can print it: no HTML, which sites write, and no control characters."""
    if not isinstance(value, str):
        return ""
    text = value[:_MOST_TEXT]
    if "<" in text and ">" in text:
        plain = _Plain()
        plain.feed(text)
        text = "".join(plain.parts)
    lines = (printable(" ".join(line.split()), _MOST_TEXT) for line in text.splitlines())
    return "\n".join(filter(None, lines))


def _list(value: object) -> tuple[str, ...]:
    return tuple(filter(None, (_words(each) for each in value))) if isinstance(value, list) else ()


class _Plain(HTMLParser):
    """The text of a piece of HTML; a paragraph, break or list item begins a line."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = list[str]()

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "br", "li", "div"):
            self.parts.append("\n")
