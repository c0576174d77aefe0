"""A model from a path, a URL or a Hugging Face repository into our own folders: fetched, checked, scanned, placed.

    SOURCE -> data/downloads/... -> size, hash -> scan -> what it is -> data/models/KIND/NAME

Nothing appears in the models folder before all of that has passed, and what the scan refuses is deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gouache.app.download import download, without_query
from gouache.app.hashes import read_now
from gouache.app.kinds import FOLDERS, shelf
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, UnsafeFile, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.write import atomic_output
from gouache.workshop.scan import scan

OnWork = Callable[[str, int, int], None]

_REPOSITORY = re.compile(r"(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([^@]+))?")
_HUB = re.compile(
    r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)(?:/(?:blob|resolve|tree)/([\w.-]+)(?:/(.+?))?)?/?(?:\?.*)?"
)
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Installed:
    """`path` is where it lies now; `kind` what it is; `already` that it lay there before."""

    path: Path
    kind: str
    sha256: str
    size: int
    source: str
    already: bool = False


@dataclass(frozen=True)
class _Fetched:
    """What was fetched, still in a place of its own, and what it is to be called."""

    path: Path
    name: str
    source: str
    place: Path | None  # to be deleted when all is done; None for what is the user's own


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
    """Bring `source` into our models folder.

    `kind` (of the library's) and `name` overrule what it is and is called; `sha256` is what its hash has to be.
    Raises RequestError for a source that is none, or a name that another file has; FileError where it cannot be
    fetched or read or has another hash; UnsafeFile where the scan refuses it.
    """
    if kind and kind not in FOLDERS:
        raise RequestError("kind", f"{printable(kind, 60)!r} is none of {', '.join(FOLDERS)}")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise RequestError("sha256", f"{printable(sha256, 80)!r} is no SHA-256; expected 64 hexadecimal digits")
    fetched = _fetch(source, settings, token, on_work)
    # Whatever stops this, what was fetched stays for the next time, unless it is refused for what it is.
    try:
        digest = read_now(fetched.path, on_work)
        if sha256 and digest != sha256.lower():
            raise FileError(
                without_query(source), f"has the hash {digest}; {sha256.lower()} was expected: do not use it"
            )
        _must_be_safe(fetched.path, source)
        found = kind or _kind(fetched.path)
    except FileError:
        _clear(fetched)
        raise
    target = _target(settings, found, fetched, name)
    size = _size(fetched.path)
    already = target.exists()
    if already and read_now(target, on_work) != digest:
        raise RequestError("name", f"{target} is there already, and is another file; choose another with --name")
    if not already:
        _put(fetched, target, on_work)
    _clear(fetched)
    return Installed(target, found, digest, size, fetched.source, already)


def _clear(fetched: _Fetched) -> None:
    if fetched.place is not None:
        shutil.rmtree(fetched.place, ignore_errors=True)


def _fetch(source: str, settings: Settings, token: str, on_work: OnWork | None) -> _Fetched:
    path = Path(source).expanduser()
    if path.exists():
        return _Fetched(path, path.name, str(path.resolve()), None)
    place = settings.data / "downloads" / hashlib.sha256(source.encode()).hexdigest()[:16]
    if match := _HUB.fullmatch(source):
        return _from_hub(match[1], match[2] or "main", match[3] or "", place, token)
    if "://" in source:
        part, name = download(source, place, token=token, on_work=on_work)
        return _Fetched(part, name, without_query(source), place)
    if match := _REPOSITORY.fullmatch(source):
        return _from_hub(match[1], match[2] or "main", match[3] or "", place, token)
    shown = printable(source)
    raise RequestError("source", f"{shown!r} is no file here, no URL and no Hugging Face repository ORG/NAME")


def _from_hub(repository: str, revision: str, file: str, place: Path, token: str) -> _Fetched:
    """A file of a repository, or all of a diffusers folder; the hub's own library knows how, and resumes by itself."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    page = f"https://huggingface.co/{repository}"
    try:
        if not file:
            files = HfApi(token=token or None).list_repo_files(repository, revision=revision)
            if "model_index.json" in files:
                folder = place / "folder"
                snapshot_download(
                    repository, revision=revision, local_dir=folder, allow_patterns=_needed(files), token=token or None
                )
                return _Fetched(folder, repository.replace("/", "--"), f"{page}/tree/{revision}", place)
            file = _only(repository, files)
        path = hf_hub_download(repository, file, revision=revision, local_dir=place / "file", token=token or None)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise FileError(f"huggingface.co/{repository}", f"cannot be fetched: {reason}") from None
    return _Fetched(Path(path), Path(file).name, f"{page}/resolve/{revision}/{file}", place)


def _needed(files: list[str]) -> list[str]:
    """Of a diffusers folder: configurations, words, and of weights one form, the safest, in full precision."""
    weights = [each for each in files if each.endswith(_WEIGHTS) and "/" in each]
    safe = [each for each in weights if each.endswith(".safetensors")] or weights
    whole = [each for each in safe if not re.search(r"\.(fp16|bf16|fp8|non_ema|openvino)\b", each)] or safe
    texts = [each for each in files if each.endswith((".json", ".txt", ".model")) and each.count("/") <= 1]
    return texts + whole


def _only(repository: str, files: list[str]) -> str:
    there = [each for each in files if each.endswith(_WEIGHTS)]
    safe = [each for each in there if each.endswith(".safetensors")]
    for group in (safe, there):
        if len(group) == 1:
            return group[0]
    if not there:
        raise RequestError("source", f"huggingface.co/{repository} holds no weights")
    shown = ", ".join(printable(each, 80) for each in (safe or there)[:8])
    raise RequestError("source", f"{repository} holds several files; name one as {repository}/FILE: {shown}")


def _kind(path: Path) -> str:
    if (path / "model_index.json").exists():
        return "checkpoint"
    return shelf(identify(open_model(path)).kind.value)


def _must_be_safe(path: Path, source: str) -> None:
    for verdict in scan([path]):
        if verdict.verdict != "safe" and not (path.is_dir() and verdict.verdict == "no model"):
            calls = "; ".join(f"{each.name}: {each.effect}" for each in verdict.intents[:3])
            reason = f"{verdict.verdict}: {verdict.reason}" + (f" ({calls})" if calls else "")
            raise UnsafeFile(without_query(source), f"is refused and not kept, {reason}")


def _target(settings: Settings, kind: str, fetched: _Fetched, name: str) -> Path:
    folder = settings.data / "models" / FOLDERS.get(kind, "")
    suffix = "" if fetched.path.is_dir() else Path(fetched.name).suffix
    called = fetched.name
    if name:
        if re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name.strip(". ") != name:
            raise RequestError("name", f"{printable(name)!r} cannot be a file's name")
        called = name if not suffix or name.endswith(suffix) else name + suffix
    return folder / called


def _put(fetched: _Fetched, target: Path, on_work: OnWork | None) -> None:
    """Move or copy it to its place, where it appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if fetched.place is not None:
        shutil.rmtree(fetched.path / ".cache", ignore_errors=True)  # what the hub's library noted in a folder
        fetched.path.replace(target)
    elif fetched.path.is_dir():
        draft = target.with_name(f".gouache-{target.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(fetched.path, draft)
        draft.replace(target)
    else:
        size, done = fetched.path.stat().st_size, 0
        with fetched.path.open("rb") as file, atomic_output(target, size) as output:
            while piece := file.read(1 << 24):
                output.write(piece)
                done += len(piece)
                if on_work is not None:
                    on_work("copying", done, size)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
