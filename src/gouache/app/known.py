"""Facts on well-known models, from `known_models.toml` beside this file, where each has its sources."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """What is publicly known of a model; "" or () or None where no source was found. Keys as the file explains."""

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
def known() -> tuple[Known, ...]:
    """All of them, in the order of the file."""
    text = Path(__file__).with_name("known_models.toml").read_text(encoding="utf-8")
    return tuple(Known(**_tuples(each)) for each in tomllib.loads(text)["model"])


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def named(name: str) -> Known | None:
    """The model that users call `name`: by its name, an alias, or a file's name with or without its ending."""
    wanted = _plain(name)
    for each in known():
        files = [form for file in each.files for form in (file, file.rsplit(".", 1)[0])]
        if wanted in map(_plain, (each.name, *each.aliases, *files)):
            return each
    return None


def of_file(name: str, sha256: str) -> Known | None:
    """The model whose published hash this is, else whose file is called so, unless it is known to be another."""
    for each in known():
        if sha256 and sha256 in (each.sha256 or {}).values():
            return each
    like = called(name)
    return None if like is None or differs(like, name, sha256) else like


def called(name: str) -> Known | None:
    """The model one of whose published files has this name."""
    return next((each for each in known() if name in each.files), None)


def differs(published: Known, name: str, sha256: str) -> bool:
    """Whether a file with this hash cannot be the one that was published under this name."""
    return bool(sha256) and (published.sha256 or {}).get(name, sha256) != sha256


def nearest(name: str) -> list[str]:
    """Names and aliases like `name`."""
    every = {_plain(form): form for each in known() for form in (each.name, *each.aliases)}
    return [every[form] for form in difflib.get_close_matches(_plain(name), every, n=3)]


def _plain(name: str) -> str:
    """Without case, spaces, dots, dashes and underscores, which everybody writes differently."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())
