"""Names to model files: "mini", a path, or a name as A1111 has them: `name`, `folder/name`, `name [hash]`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from gouache.app.hashes import hashes, sha256_of
from gouache.app.places import Candidate, candidates
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, printable

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
DEFAULT = "mini"
_WITH_HASH = re.compile(r"(.*?)\s*\[([0-9a-fA-F]{8,64})\]")


def resolve(name: str, settings: Settings, kind: str = "") -> Path:
    """The file or folder that `name` means; where several have it, the first in a place for `kind`, if that is given.

    Raises RequestError with the nearest names where there is none, or where none with that name has that hash.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError):
        pass  # too long for a path, or in the home of nobody known
    inside = embedded(name) if kind in ("", "checkpoint") else None
    if inside is not None:
        return inside
    found = list(candidates(settings))
    bare, digest = _parted(name)
    called = _called(bare, found, kind)
    if digest:
        return _of_hash(bare, digest, called, settings)
    if called:
        return called[0].path
    name = printable(name)
    near = difflib.get_close_matches(name, [*(each for one in found for each in one.names), DEFAULT], n=3)
    hint = f"the nearest are {', '.join(near)}" if near else f"looked in {', '.join(map(str, settings.models))}"
    what = kind or "model"
    raise RequestError(what, f"there is no file {name!r} and no {what} of that name; {hint}")


def _parted(name: str) -> tuple[str, str]:
    """A1111's title of a model, "name.safetensors [0123456789]", in its parts."""
    match = _WITH_HASH.fullmatch(name.strip())
    return (match[1], match[2].lower()) if match else (name, "")


def _called(name: str, found: list[Candidate], kind: str) -> list[Candidate]:
    """Those of that name: to the letter if any, else whatever the case; places for `kind` first, wrong ones last."""
    exact = [each for each in found if name in each.names]
    folded = name.casefold().replace("\\", "/")
    alike = exact or [each for each in found if folded in (one.casefold() for one in each.names)]
    return sorted(alike, key=lambda each: 0 if not kind or each.kind == kind else 1 if not each.kind else 2)


def _of_hash(name: str, digest: str, called: list[Candidate], settings: Settings) -> Path:
    """Among those of that name, or, where none is (it was renamed), among all that have been hashed."""
    from gouache.app.library import Library

    seen = list[str]()
    for each in called:
        if each.path.is_dir():
            continue
        try:
            whole = sha256_of(each.path, settings)
            if whole.startswith(digest) or (len(digest) == 8 and hashes(each.path, settings).autov1 == digest):
                return each.path
        except (OSError, FileError):
            continue
        seen.append(f"{each.names[0]} [{whole[:10]}]")
    with Library.of(settings) as library:
        renamed = library.paths_of_hash(digest)
        if not renamed:  # since it was last looked through
            library.refresh()
            renamed = library.paths_of_hash(digest)
    if renamed:
        return renamed[0]
    there = f"there are {', '.join(seen)}" if seen else "`gouache models list` tells what there is"
    raise RequestError("model", f"no model {printable(name)!r} has the hash {digest}; {there}")


def embedded(name: str) -> Path | None:
    """The model `name` inside the package, if there is one."""
    return next((path for path in EMBEDDED.glob("*.safetensors") if path.stem == name), None)
