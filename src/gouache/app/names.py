"""Finds model files by name: "mini", a path, or a name as in A1111: `name`, `folder/name`, `name [hash]`.

A name without a folder, such as `mini` or `hats`, is looked up in the library first: a file or folder of that name in
the working folder does not hide a model. `./hats` and `hats.safetensors` are paths first.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from gouache.app.hashes import hashes, sha256_of
from gouache.app.search_paths import SUFFIXES, Candidate, candidates
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, printable

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
DEFAULT = "mini"
_WITH_HASH = re.compile(r"(.*?)\s*\[([0-9a-fA-F]{8,64})\]", re.DOTALL)
_MAX_NAME = 1000  # letters; what is longer is nobody's name


def resolve(name: str, settings: Settings, kind: str = "", setting: str = "", paths: bool = True) -> Path:
    """The file or folder called `name`. If several have that name, the first in a folder for `kind`, if given.

    `paths` False: only names of the library, for text that others wrote: a prompt's tags, a picture's recipe. Raises
    RequestError, with similar names, if there is none, or none with that name and hash; `setting` is the name of the
    option in its message.
    """
    path = _existing(name) if paths else None
    if path is not None and _is_run(path):
        from gouache.app.training.newest import newest_file  # which reads names itself

        return newest_file(path, settings)
    if path is not None and _is_in_stages(path):
        from gouache.app.training.folder import check_single  # which imports torch

        check_single(path)
    if path is not None and _is_explicit(name, path):
        return path
    if (inside := embedded(name) if kind in ("", "checkpoint") else None) is not None:
        return inside
    every = list(candidates(settings))
    for matching in (_exactly, _loosely):
        if found := _with_name(name, every, kind, matching):
            return found[0].path
        if path is not None:
            return path
    bare, digest = _split_hash(name)
    if digest:
        found = _with_name(bare, every, kind, _exactly) or _with_name(bare, every, kind, _loosely)
        return _with_hash(bare, digest, found, kind, setting, settings)
    name = printable(name)
    known = [each for one in every if not kind or one.category in ("", kind) for each in one.names]
    known += [DEFAULT] if kind in ("", "checkpoint") else []
    near = difflib.get_close_matches(name, known, n=3) if len(name) < _MAX_NAME else []
    hint = f"similar names: {', '.join(map(printable, near))}" if near else _searched(settings)
    what = kind or "model"
    there = f"there is no file {name!r} and no {what} of that name" if paths else f"there is no {what} named {name!r}"
    raise RequestError(setting or what, f"{there}; {hint}")


def _searched(settings: Settings) -> str:
    return f"searched {', '.join(printable(str(each)) for each in settings.models)}; `gouache models add` adds folders"


def _existing(name: str) -> Path | None:
    """`name` as a path, if there is something, or may be: a link to nothing, a file in a folder without permission."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~user with an unknown user
        return None
    try:
        path.lstat()
    except PermissionError:
        return path
    except (OSError, ValueError):
        return None  # there is none, or it is too long for a path
    return path


def _is_run(path: Path) -> bool:
    """Whether `path` is the folder of a training run, whose newest weights are meant."""
    try:
        return (path / "settings.toml").is_file() and (path / "lock").is_file()
    except (OSError, ValueError):
        return False


def _is_in_stages(path: Path) -> bool:
    """Whether `path` is the folder of a training in stages, which is not itself a run."""
    try:
        return (path / "stages.toml").is_file()
    except (OSError, ValueError):
        return False


def _is_explicit(name: str, path: Path) -> bool:
    """Whether `name`, which exists as `path`, can only mean that: `/x`, `./x`, `~/x`, a model file or model folder."""
    first = re.split(r"[/\\]" if os.name == "nt" else "/", name, maxsplit=1)[0]
    if path.is_absolute() or first in (".", "..") or first.startswith("~"):
        return True
    try:
        if path.is_dir():  # `sub/name`, as a diffusers folder or one of its components
            return first != name and any((path / each).is_file() for each in ("model_index.json", "config.json"))
    except OSError:
        return first != name
    return path.suffix.lower() in SUFFIXES


def _split_hash(name: str) -> tuple[str, str]:
    """(name, hash) of A1111's model title "name.safetensors [0123456789]"; the hash is "" if there is none."""
    match = _WITH_HASH.fullmatch(name.strip())
    return (match[1], match[2].lower()) if match else (name, "")


def _exactly(name: str) -> str:
    # macOS stores names decomposed (NFD); keyboards and pictures write them composed.
    return unicodedata.normalize("NFC", name)


def _loosely(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).replace("\\", "/").strip()


def _with_name(name: str, every: list[Candidate], kind: str, form: Callable[[str], str]) -> list[Candidate]:
    """Those with that name in that form. Those in folders for `kind` come first, those for another kind last."""
    wanted = form(name)
    found = [each for each in every if any(form(one) == wanted for one in each.names)]
    return sorted(found, key=lambda each: 0 if not kind or each.category == kind else 1 if not each.category else 2)


def _with_hash(name: str, digest: str, found: list[Candidate], kind: str, setting: str, settings: Settings) -> Path:
    """The one of `found` with that hash, or, if the file was renamed, any file with that hash in the library."""
    others = list[str]()
    for each in found:
        if each.path.is_dir():
            continue
        try:
            if has_hash(each.path, digest, settings):
                return each.path
            others.append(f"{printable(each.names[0])} [{sha256_of(each.path, settings)[:10]}]")
        except FileError:
            continue
    from gouache.app.library import Library

    with Library.of(settings) as library:
        renamed = _first_with_hash(library.paths_of_hash(digest), digest, settings)
        if renamed is None:  # it may have been renamed since the last refresh
            library.refresh()
            renamed = _first_with_hash(library.paths_of_hash(digest), digest, settings)
            renamed = renamed or library.find_hash(digest, kind)
    if renamed is not None:
        return renamed
    hint = f"there is {', '.join(others[:5])}" if others else "`gouache models list` lists all models"
    raise RequestError(setting or kind or "model", f"no model {printable(name)!r} has the hash {digest}; {hint}")


def _first_with_hash(paths: Iterable[Path], digest: str, settings: Settings) -> Path | None:
    """The library's hash may be that of a file that was replaced by one of the same size and time."""
    for path in paths:
        try:
            if path.is_dir() or has_hash(path, digest, settings):
                return path
        except FileError:
            continue
    return None


def has_hash(path: Path, digest: str, settings: Settings) -> bool:
    """Whether `digest` begins one of the hashes that pictures carry for this file. Raises FileError.

    A1111 writes AutoV2 (or, long ago, AutoV1) for checkpoints and AutoV3 for LoRAs.
    """
    if sha256_of(path, settings).startswith(digest):
        return True
    if len(digest) not in (8, 10, 12):
        return False
    every = hashes(path, settings)
    return digest == every.autov1 or bool(every.autov3 and every.autov3.startswith(digest))


def embedded(name: str) -> Path | None:
    """The model `name` inside the package, if there is one."""
    return next((path for path in EMBEDDED.glob("*.safetensors") if path.stem == name), None)
