"""Finds model files by name: "mini", a path, or a name as in A1111: `name`, `folder/name`, `name [hash]`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from gouache.app.hashes import hashes, sha256_of
from gouache.app.search_paths import Candidate, candidates
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, printable

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
DEFAULT = "mini"
_WITH_HASH = re.compile(r"(.*?)\s*\[([0-9a-fA-F]{8,64})\]")


def resolve(name: str, settings: Settings, kind: str = "", setting: str = "") -> Path:
    """The file or folder called `name`. If several have that name, the first in a folder for `kind`, if given.

    Raises RequestError, with similar names, if there is none, or none with that name and hash; `setting` is the name
    of the option in its message.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError):
        pass  # too long for a path, or ~user with an unknown user
    inside = embedded(name) if kind in ("", "checkpoint") else None
    if inside is not None:
        return inside
    every = list(candidates(settings))
    bare, digest = _split_hash(name)
    found = _with_name(bare, every, kind)
    if digest:
        return _with_hash(bare, digest, found, settings)
    if found:
        return found[0].path
    name = printable(name)
    near = difflib.get_close_matches(name, [*(each for one in every for each in one.names), DEFAULT], n=3)
    hint = f"similar names: {', '.join(near)}" if near else f"searched {', '.join(map(str, settings.models))}"
    what = kind or "model"
    raise RequestError(setting or what, f"there is no file {name!r} and no {what} of that name; {hint}")


def _split_hash(name: str) -> tuple[str, str]:
    """(name, hash) of A1111's model title "name.safetensors [0123456789]"; the hash is "" if there is none."""
    match = _WITH_HASH.fullmatch(name.strip())
    return (match[1], match[2].lower()) if match else (name, "")


def _with_name(name: str, every: list[Candidate], kind: str) -> list[Candidate]:
    """Those with that name: exact matches if there are any, else ignoring case.

    Those in folders for `kind` come first, those in folders for another kind last.
    """
    exact = [each for each in every if name in each.names]
    folded = name.casefold().replace("\\", "/")
    found = exact or [each for each in every if folded in (one.casefold() for one in each.names)]
    return sorted(found, key=lambda each: 0 if not kind or each.category == kind else 1 if not each.category else 2)


def _with_hash(name: str, digest: str, found: list[Candidate], settings: Settings) -> Path:
    """The one of `found` with that hash, or, if the file was renamed, any file with that hash in the library."""
    from gouache.app.library import Library

    others = list[str]()
    for each in found:
        if each.path.is_dir():
            continue
        try:
            full = sha256_of(each.path, settings)
            if full.startswith(digest) or (len(digest) == 8 and hashes(each.path, settings).autov1 == digest):
                return each.path
        except (OSError, FileError):
            continue
        others.append(f"{each.names[0]} [{full[:10]}]")
    with Library.of(settings) as library:
        renamed = library.paths_of_hash(digest)
        if not renamed:  # it may have been renamed since the last refresh
            library.refresh()
            renamed = library.paths_of_hash(digest)
    if renamed:
        return renamed[0]
    hint = f"there is {', '.join(others)}" if others else "`gouache models list` lists all models"
    raise RequestError("model", f"no model {printable(name)!r} has the hash {digest}; {hint}")


def embedded(name: str) -> Path | None:
    """The model `name` inside the package, if there is one."""
    return next((path for path in EMBEDDED.glob("*.safetensors") if path.stem == name), None)
