"""Facts about well-known models, from `known_models.toml` in this folder, which cites a source for each."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.outside import parse_toml, read_text


@dataclass(frozen=True)
class KnownModel:
    """A published model. "", () or None where no source was found. The fields are explained in the TOML file."""

    name: str
    aliases: tuple[str, ...]
    family: str
    use: str
    source: str
    evidence: tuple[str, ...]
    prediction: str = ""
    resolution: tuple[int, ...] = ()
    clip_skip: int | None = None
    vae: str = ""
    licence: str = ""
    files: tuple[str, ...] = ()
    trigger: tuple[str, ...] = ()
    note: str = ""
    sha256: Mapping[str, str] | None = None


@functools.cache
def known_models() -> tuple[KnownModel, ...]:
    """All entries, in the order of the file."""
    text = read_text(Path(__file__).with_name("known_models.toml"))
    return tuple(KnownModel(**_with_tuples(each)) for each in parse_toml(text)["model"])


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def find_by_name(name: str) -> KnownModel | None:
    """The model with this name, alias, or file name with or without its extension."""
    wanted = _normalised(name)
    for each in known_models():
        files = [form for file in each.files for form in (file, file.rsplit(".", 1)[0])]
        if wanted in map(_normalised, (each.name, *each.aliases, *files)):
            return each
    return None


def find_by_file(name: str, sha256: str) -> KnownModel | None:
    """The model that published a file with this hash; else one with this file name, unless the hash contradicts it."""
    for each in known_models():
        if sha256 and sha256 in (each.sha256 or {}).values():
            return each
    found = find_by_file_name(name)
    return None if found is None or hash_differs(found, name, sha256) else found


def find_by_file_name(name: str) -> KnownModel | None:
    """The model that published a file with this name."""
    return next((each for each in known_models() if name in each.files), None)


def hash_differs(published: KnownModel, name: str, sha256: str) -> bool:
    """Whether a file with this hash cannot be the one that was published under this name."""
    return bool(sha256) and (published.sha256 or {}).get(name, sha256) != sha256


def similar_names(name: str) -> list[str]:
    """Up to three names and aliases spelt like `name`."""
    every = {_normalised(form): form for each in known_models() for form in (each.name, *each.aliases)}
    return [every[form] for form in difflib.get_close_matches(_normalised(name), every, n=3)]


def _normalised(name: str) -> str:
    """Lower case, without spaces, dots, dashes and underscores, since these vary between spellings."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())
