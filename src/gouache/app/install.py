"""Installs a model from a path, a URL or a Hugging Face repository: download, check, scan, move to its folder.

    SOURCE -> data/downloads/... -> size, hash -> scan -> identify -> data/models/CATEGORY/NAME

Nothing is placed in the models folder before all checks have passed, and a file that the scan refuses is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from gouache.app.cache import make_private
from gouache.app.categories import FOLDERS, category
from gouache.app.download import download, without_query
from gouache.app.hashes import read_now
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, UnsafeFile, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.source import size_text
from gouache.files.write import atomic_output, remove_stale_temporaries, temporary_name
from gouache.outside import MalformedText, open_outside, parse_json, read_outside, read_text
from gouache.workshop.scan import scan

OnWork = Callable[[str, int, int], None]

_REPOSITORY = re.compile(r"(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([^@]+))?")
_HUB = re.compile(
    r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)(?:/(?:blob|resolve|tree)/([\w.-]+)(?:/(.+?))?)?/?(?:\?.*)?"
)
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_SUFFIXES = (*_WEIGHTS, ".sft", ".png", ".webp")
_MAX_NAME = 200  # bytes: temporary names beside it need room


@dataclass(frozen=True)
class Installed:
    """`path`: the installed file or folder. `kind`: its category. `already`: it had been installed before."""

    path: Path
    kind: str
    sha256: str
    size: int
    source: str
    already: bool = False


@dataclass(frozen=True)
class _Download:
    """A model before it is installed. `folder` is temporary and deleted afterwards; None for a file of the user's."""

    path: Path
    name: str
    source: str
    folder: Path | None


def install(
    source: str,
    settings: Settings,
    *,
    kind: str = "",
    name: str = "",
    sha256: str = "",
    token: str = "",
    on_work: OnWork | None = None,
) -> Installed:
    """Install `source` into Gouache's own models folder.

    `kind` (a category of the library) and `name` override what is found; `sha256` is the expected hash.
    Raises RequestError for an invalid source, or a name that another file has; FileError if it cannot be downloaded or
    read or has another hash; UnsafeFile if the scan refuses it.
    """
    if name and (fault := name_fault(name)):
        raise RequestError("name", f"{printable(name)!r} cannot be used as a file name: {fault}")
    if kind and kind not in FOLDERS:
        raise RequestError("kind", f"{printable(kind, 60)!r} is not a category; use one of {', '.join(FOLDERS)}")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise RequestError("sha256", f"{printable(sha256, 80)!r} is not a SHA-256; expected 64 hexadecimal digits")
    fetched = _download(source, settings, token, on_work)
    # After any other error or Ctrl-C the download is kept for the next try; it is deleted only if its content is bad.
    try:
        digest = read_now(fetched.path, on_work)
        if sha256 and digest != sha256.lower():
            raise FileError(
                without_query(source), f"has the hash {digest}, but {sha256.lower()} was expected: do not use it"
            )
        _check_safe(fetched.path, source)
        found = kind or _category(fetched.path)
    except FileError:
        _delete_temporary(fetched)
        raise
    target = _target(settings, found, fetched, name)
    size = _size(fetched.path)
    already = target.exists()
    if already and read_now(target, on_work) != digest:
        raise RequestError("name", f"{target} exists and is another file; choose another name with --name")
    if not already:
        _place(fetched, target, on_work)
    _delete_temporary(fetched)
    return Installed(target, found, digest, size, fetched.source, already)


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser()
        path.lstat()
    except PermissionError as error:
        raise FileError(source, f"cannot be read: {error.strerror}") from None
    except (OSError, RuntimeError, ValueError):
        return None
    return path


def _escaped(path: Path) -> str:
    """The path as text that can be stored: a name need not be valid Unicode. Raises FileError."""
    try:
        return printable(str(path.resolve()), 4000)
    except (OSError, RuntimeError):
        raise FileError(path, "cannot be followed: it is a link to itself") from None


def _delete_temporary(fetched: _Download) -> None:
    if fetched.folder is not None:
        shutil.rmtree(fetched.folder, ignore_errors=True)


def _download(source: str, settings: Settings, token: str, on_work: OnWork | None) -> _Download:
    path = _existing(source)
    if path is not None:
        if not path.is_dir():
            open_outside(path).close()  # a named pipe or a device would never end
        return _Download(path, path.resolve().name if path.name in ("", "..") else path.name, _escaped(path), None)
    folder = settings.data / "downloads" / hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    if match := _HUB.fullmatch(source):
        return _from_hub(match[1], match[2] or "main", match[3] or "", folder, token, on_work)
    if "://" in source:
        part, name = download(source, folder, token=token, on_work=on_work)
        return _Download(part, name, without_query(source), folder)
    if match := _REPOSITORY.fullmatch(source):
        return _from_hub(match[1], match[2] or "main", match[3] or "", folder, token, on_work)
    shown = printable(source)
    raise RequestError("source", f"{shown!r} is not a file, not a URL and not a Hugging Face repository ORG/NAME")


def _from_hub(repository: str, revision: str, file: str, folder: Path, token: str, on_work: OnWork | None) -> _Download:
    """One file of a repository, or a whole diffusers folder. What was downloaded is not downloaded again."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    page = f"https://huggingface.co/{repository}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileError(f"huggingface.co/{repository}", "cannot be downloaded: HF_HUB_OFFLINE is set")
    token = token or _hub_token()
    if not file:
        address = f"{endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}"
        files = _files_of(address, folder, token)
        if "model_index.json" in files:
            target = folder / "folder"
            for each in _needed(files):
                part = folder / "parts" / hashlib.sha256(each.encode()).hexdigest()[:16]
                place = target / each
                if not place.exists():
                    url = f"{endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(each)}"
                    received, _ = download(url, part, token=token, on_work=on_work)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    received.replace(place)
            return _Download(target, repository.replace("/", "--"), f"{page}/tree/{revision}", folder)
        file = _only_weights(repository, files)
    url = f"{endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(file)}"
    path, _ = download(url, folder / "file", token=token, on_work=on_work)
    return _Download(path, PurePosixPath(file).name, f"{page}/resolve/{revision}/{file}", folder)


def _files_of(url: str, folder: Path, token: str) -> list[str]:
    """The names of the files of a repository. Those that lead out of it are left out."""
    listing = folder / "listing"
    shutil.rmtree(listing, ignore_errors=True)  # never the one of an earlier try
    path, _ = download(url, listing, token=token)
    try:
        answer = parse_json(read_outside(path))
    except MalformedText as error:
        raise FileError(without_query(url), f"the server's answer {error}") from None
    siblings = answer.get("siblings") if isinstance(answer, dict) else None
    if not isinstance(siblings, list):
        raise FileError(without_query(url), "the server's answer has no list of files")
    names = [each.get("rfilename") for each in siblings if isinstance(each, dict)]
    return [each for each in names if isinstance(each, str) and _is_inside(each)]


def _is_inside(name: str) -> bool:
    """Whether the relative path `name` is a possible one that stays in its folder."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and not name_fault(part) for part in parts)


def _hub_token() -> str:
    """The token that huggingface_hub's login has stored, as huggingface_hub finds it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token
    try:
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        return read_text(os.environ.get("HF_TOKEN_PATH") or home / "token", 1000).strip()
    except (FileError, RuntimeError):
        return ""


def _needed(files: list[str]) -> list[str]:
    """The files to download of a diffusers folder: configurations, vocabularies, and each weight in one form.

    Of several forms, safetensors and full precision are preferred.
    """
    weights = [each for each in files if each.endswith(_WEIGHTS) and "/" in each]
    safe = [each for each in weights if each.endswith(".safetensors")] or weights
    full = [each for each in safe if not re.search(r"\.(fp16|bf16|fp8|non_ema|openvino)\b", each)] or safe
    texts = [each for each in files if each.endswith((".json", ".txt", ".model")) and each.count("/") <= 1]
    return texts + full


def _only_weights(repository: str, files: list[str]) -> str:
    """The one weight file of a repository, safetensors preferred. Raises RequestError for none or several."""
    weights = [each for each in files if each.endswith(_WEIGHTS)]
    safe = [each for each in weights if each.endswith(".safetensors")]
    for group in (safe, weights):
        if len(group) == 1:
            return group[0]
    if not weights:
        raise RequestError("source", f"huggingface.co/{repository} contains no weights")
    shown = ", ".join(printable(each, 80) for each in (safe or weights)[:8])
    raise RequestError("source", f"{repository} contains several files; name one as {repository}/FILE: {shown}")


def _category(path: Path) -> str:
    if (path / "model_index.json").exists():
        return "checkpoint"
    return category(identify(open_model(path)).kind.value)


def _check_safe(path: Path, source: str) -> None:
    for verdict in scan([path]):
        if verdict.verdict != "safe" and not (path.is_dir() and verdict.verdict == "not a model"):
            calls = "; ".join(f"{each.name}: {each.effect}" for each in verdict.intents[:3])
            reason = f"{verdict.verdict}: {verdict.reason}" + (f" ({calls})" if calls else "")
            raise UnsafeFile(without_query(source), f"refused and deleted, {reason}")


def name_fault(name: str) -> str:
    """Why `name` cannot be the name of a file on all systems; "" if it can. One rule for --name, files and servers."""
    if not name or name != name.strip(" ."):
        return "it is empty, hidden, or begins or ends with a space or a dot"
    if name.startswith("-"):
        return "it would be read as an option"
    if re.search(r'[<>:"/\\|?*]', name):
        return 'it has one of the characters < > : " / \\ | ? *'
    if not name.isprintable():
        return "it has characters that cannot be seen"
    device = name.split(".")[0].strip().lower().translate(str.maketrans("¹²³", "123"))
    if re.fullmatch(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9]", device):
        return f"Windows has a device called {device}"
    size = len(name.encode())
    return f"it has {size} bytes, at most {_MAX_NAME} are possible" if size > _MAX_NAME else ""


def _target(settings: Settings, kind: str, fetched: _Download, name: str) -> Path:
    folder = settings.data / "models" / FOLDERS.get(kind, "")
    chosen = name or fetched.name
    if not fetched.path.is_dir():
        suffix = Path(fetched.name).suffix
        if suffix.lower() not in _SUFFIXES:  # without one the library would never list it
            suffix = ".safetensors" if open_model(fetched.path).format == "safetensors" else ".ckpt"
        if not chosen.lower().endswith(suffix.lower()):
            chosen += suffix
    if fault := name_fault(chosen):
        advice = "" if name else "; give it another name with --name"
        raise RequestError("name", f"{printable(chosen)!r} cannot be used as a file name: {fault}{advice}")
    return folder / chosen


def _place(fetched: _Download, target: Path, on_work: OnWork | None) -> None:
    """Move a download, or copy the user's own file, to `target`, where only the complete model appears."""
    try:
        make_private(target.parent.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if fetched.folder is not None:
            fetched.path.replace(target)
        elif fetched.path.is_dir():
            _copy_folder(fetched.path, target, on_work)
        else:
            _copy_file(fetched.path, target, on_work)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise FileError(target, f"cannot be installed: {reason}") from None


def _copy_file(path: Path, target: Path, on_work: OnWork | None) -> None:
    with open_outside(path) as file:
        size, done = os.fstat(file.fileno()).st_size, 0
        with atomic_output(target, size) as output:
            while chunk := file.read(1 << 24):
                output.write(chunk)
                done += len(chunk)
                if on_work is not None:
                    on_work("copying", done, size)


def _copy_folder(folder: Path, target: Path, on_work: OnWork | None) -> None:
    """The files that a diffusers folder needs, by way of a temporary folder that is removed if anything fails."""
    files = _needed_files(folder)
    total, done = sum(path.stat().st_size for path, _ in files), 0
    free = shutil.disk_usage(target.parent).free
    if total > free:
        raise FileError(target, f"cannot be installed: it needs {size_text(total)}, and {size_text(free)} are free")
    remove_stale_temporaries(target.parent, ".tmp")
    draft = temporary_name(target.parent, ".tmp")
    try:
        for path, name in files:
            place = draft / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with open_outside(path) as file, place.open("xb") as output:
                while chunk := file.read(1 << 24):
                    output.write(chunk)
                    done += len(chunk)
                    if on_work is not None:
                        on_work("copying", done, total)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _needed_files(folder: Path) -> list[tuple[Path, str]]:
    """(path, name in the folder) of the regular files to copy. Raises FileError for a needed one that leads outside."""
    names = [each.name for each in folder.iterdir() if each.is_file()]
    for inner in folder.iterdir():
        if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
            names += [f"{inner.name}/{each.name}" for each in inner.iterdir() if each.is_file()]
    found = [(folder / name, name) for name in dict.fromkeys(_needed(sorted(names)))]
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # of the Hugging Face cache, which is made of links to its blobs
        inside.append(folder.resolve().parent.parent / "blobs")
    for path, _ in found:
        if not any(path.resolve().is_relative_to(each) for each in inside):
            raise FileError(path, "is a link to a file outside of the folder, which is not installed")
    return found


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each, _ in _needed_files(path)]
    return sum(each.stat().st_size for each in files)
