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

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gouache.errors import FileError, printable
from gouache.outside import MalformedText, parse_json, read_text

PREVIEWS = tuple(
    f"{middle}{suffix}" for middle in (".preview", "") for suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif")
)
MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft", ".png", ".webp")
_MAX_BYTES = 4_000_000  # larger files hold previews embedded in JSON and are not read
_MAX_TEXT = 20_000


@dataclass(frozen=True)
class Sidecar:
    """The combined values; "", () or None where no file has one. `sha256` in lower case. `files`: those read.

    `left_at`: the path that the model had before it was moved, if the files stayed there.
    """

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
    left_at: str = ""


def read(model: Path, names: Container[str] | None = None, before: Path | None = None) -> Sidecar:
    """Read all sidecar files of `model`; files that cannot be read are skipped.

    `names`, if given, are the names in its folder. If there are no sidecar files, those of `before` are read: the path
    that the model had until it was moved, unless there is another model now.
    """
    found = _read(model, names)
    if found.files or before is None or before == model or _exists(before):
        return found
    left = _read(before, None)
    return replace(left, left_at=str(before)) if left.files else found


def from_stored(values: Mapping[str, Any]) -> Sidecar:
    """A Sidecar from its fields as stored, without those that are damaged."""
    sound: dict[str, Any] = {}
    for each in fields(Sidecar):
        value = values.get(each.name)
        if isinstance(each.default, tuple) and isinstance(value, list):
            sound[each.name] = tuple(one for one in value if isinstance(one, str))
        elif isinstance(value, str if isinstance(each.default, str) else int | float):
            sound[each.name] = value
    return Sidecar(**sound)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _read(model: Path, names: Container[str] | None) -> Sidecar:
    values: dict[str, Any] = {}
    files = list[str]()
    # By its suffix, not by what it is: the file may not be there any more. A folder "v1.5" has none.
    stem = model.with_suffix("") if model.suffix.lower() in MODEL_SUFFIXES else model
    for suffix, reader in _READERS.items():
        name = stem.name + suffix
        if names is not None and name not in names:
            continue
        found = {key: value for key, value in reader(stem.with_name(name)) if value not in ("", (), None)}
        if found:
            files.append(name)
            values.update(found)
    for field, suffixes in (("preview", PREVIEWS), ("config", (".yaml",))):
        for name in (stem.name + suffix for suffix in suffixes):
            if name != model.name and (name in names if names is not None else _exists(stem.with_name(name))):
                values[field] = str(stem.with_name(name))
                files.append(name)
                break
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
        return read_text(path, _MAX_BYTES, errors="replace")
    except (FileError, OSError):
        return None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = parse_json(_read_text(path) or "{}")
    except MalformedText:
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
