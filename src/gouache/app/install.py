"""Installs a model from a path, a URL or a Hugging Face repository: download, check, scan, move to its folder.

    SOURCE -> data/downloads/... -> size, hash -> scan -> identify -> data/models/CATEGORY/NAME

Nothing is placed in the models folder before all checks have passed, and a file that the scan refuses is deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gouache.app.categories import FOLDERS, category
from gouache.app.download import download, without_query
from gouache.app.hashes import read_now
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


def _delete_temporary(fetched: _Download) -> None:
    if fetched.folder is not None:
        shutil.rmtree(fetched.folder, ignore_errors=True)


def _download(source: str, settings: Settings, token: str, on_work: OnWork | None) -> _Download:
    path = Path(source).expanduser()
    if path.exists():
        return _Download(path, path.name, str(path.resolve()), None)
    folder = settings.data / "downloads" / hashlib.sha256(source.encode()).hexdigest()[:16]
    if match := _HUB.fullmatch(source):
        return _from_hub(match[1], match[2] or "main", match[3] or "", folder, token)
    if "://" in source:
        part, name = download(source, folder, token=token, on_work=on_work)
        return _Download(part, name, without_query(source), folder)
    if match := _REPOSITORY.fullmatch(source):
        return _from_hub(match[1], match[2] or "main", match[3] or "", folder, token)
    shown = printable(source)
    raise RequestError("source", f"{shown!r} is not a file, not a URL and not a Hugging Face repository ORG/NAME")


def _from_hub(repository: str, revision: str, file: str, folder: Path, token: str) -> _Download:
    """One file of a repository, or a whole diffusers folder. huggingface_hub resumes interrupted downloads itself."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    page = f"https://huggingface.co/{repository}"
    try:
        if not file:
            files = HfApi(token=token or None).list_repo_files(repository, revision=revision)
            if "model_index.json" in files:
                target = folder / "folder"
                snapshot_download(
                    repository, revision=revision, local_dir=target, allow_patterns=_needed(files), token=token or None
                )
                return _Download(target, repository.replace("/", "--"), f"{page}/tree/{revision}", folder)
            file = _only_weights(repository, files)
        path = hf_hub_download(repository, file, revision=revision, local_dir=folder / "file", token=token or None)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise FileError(f"huggingface.co/{repository}", f"cannot be downloaded: {reason}") from None
    return _Download(Path(path), Path(file).name, f"{page}/resolve/{revision}/{file}", folder)


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


def _target(settings: Settings, kind: str, fetched: _Download, name: str) -> Path:
    folder = settings.data / "models" / FOLDERS.get(kind, "")
    suffix = "" if fetched.path.is_dir() else Path(fetched.name).suffix
    chosen = fetched.name
    if name:
        if re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name.strip(". ") != name:
            raise RequestError("name", f"{printable(name)!r} cannot be used as a file name")
        chosen = name if not suffix or name.endswith(suffix) else name + suffix
    return folder / chosen


def _place(fetched: _Download, target: Path, on_work: OnWork | None) -> None:
    """Move a download, or copy the user's own file, to `target`, where only the complete model appears."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if fetched.folder is not None:
        shutil.rmtree(fetched.path / ".cache", ignore_errors=True)  # huggingface_hub's own metadata in a folder
        fetched.path.replace(target)
    elif fetched.path.is_dir():
        draft = target.with_name(f".gouache-{target.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(fetched.path, draft)
        draft.replace(target)
    else:
        size, done = fetched.path.stat().st_size, 0
        with fetched.path.open("rb") as file, atomic_output(target, size) as output:
            while chunk := file.read(1 << 24):
                output.write(chunk)
                done += len(chunk)
                if on_work is not None:
                    on_work("copying", done, size)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
