"""Where model files are searched for: Gouache's own folders, those of A1111 and ComfyUI, the Hugging Face cache.

An entry of `settings.models` is one of:

    an A1111 or Forge installation   models/Stable-diffusion, models/VAE, models/Lora, embeddings, ...
    a ComfyUI installation           models/checkpoints, models/loras, ..., and its extra_model_paths.yaml
    an extra_model_paths.yaml        given by its own path
    any other folder                 searched recursively; the content of a file decides what it is

Of an installation only the known folders are searched, because it is full of .pt and .bin files that are not models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.app.categories import A1111
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError
from gouache.outside import MalformedText, parse_yaml, read_outside, read_text

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
PICTURE_SUFFIXES = (".png", ".webp")  # in folders of embeddings these can contain an embedding

# ComfyUI's folders below models/ -> category. The keys of its extra_model_paths.yaml are the same.
COMFYUI = {
    "checkpoints": "checkpoint",
    "diffusers": "checkpoint",
    "vae": "vae",
    "vae_approx": "vae",
    "loras": "lora",
    "embeddings": "embedding",
    "hypernetworks": "hypernetwork",
    "controlnet": "controlnet",
    "t2i_adapter": "controlnet",
    "upscale_models": "upscaler",
    "clip": "text encoder",
    "text_encoders": "text encoder",
    "clip_vision": "image encoder",
    "unet": "unet",
    "diffusion_models": "unet",
}
# Folders of models in an installation that are not below models/.
OUTSIDE_MODELS = {"embeddings": "embedding", "extensions/sd-webui-controlnet/models": "controlnet"}
EXTRA_PATHS = "extra_model_paths.yaml"
MAX_DEPTH = 32  # of folders in each other; what is deeper is passed over


@dataclass(frozen=True)
class SearchFolder:
    """A folder to search. `category` (see `app.categories`) is what it is meant for; "" where it may hold anything."""

    path: Path
    category: str = ""


@dataclass(frozen=True)
class Candidate:
    """A file, or a diffusers folder, that may be a model.

    `names`: what it can be called, the preferred name first. `category` is that of its folder.
    """

    path: Path
    names: tuple[str, ...]
    category: str = ""


def candidates(settings: Settings) -> Iterator[Candidate]:
    """Everything that may be a model, in the order of `settings.models`; each path once."""
    seen, real = set[Path](), dict[Path, Path]()
    for found in _candidates(settings):
        parent = found.path.parent
        if parent not in real:
            real[parent] = _real(parent) or parent
        if (place := real[parent] / found.path.name) not in seen:
            seen.add(place)
            yield found


def _candidates(settings: Settings) -> Iterator[Candidate]:
    for root in settings.models:
        if _is_model(root):
            names = (root.name,) if _is_folder(root) else (root.stem, root.name)
            yield Candidate(root, names)
            continue
        folders = search_folders(root)
        others = frozenset(real for each in folders if (real := _real(each.path)) is not None)
        for folder in folders:
            for path in model_files(folder.path, folder.category, others):
                yield Candidate(path, _names(path, folder), folder.category)
    yield from hub_candidates(settings)


def _names(path: Path, folder: SearchFolder) -> tuple[str, ...]:
    """`hats`, `hats.safetensors`, the same with the folders above it, and, in a folder for a category, `Lora/hats`."""
    inner = path.relative_to(folder.path)
    if not inner.parts:  # the folder is itself a model
        return (path.name,)
    bare = inner.with_suffix("") if inner.suffix.lower() in SUFFIXES + PICTURE_SUFFIXES else inner
    names = [bare.name, inner.name, bare.as_posix(), inner.as_posix()]
    if folder.category:
        names += [f"{folder.path.name}/{name}" for name in (bare.as_posix(), inner.as_posix())]
    return tuple(dict.fromkeys(names))


def search_folders(root: Path) -> list[SearchFolder]:
    """The folders to search for an entry of `settings.models`.

    Raises FileError for an extra_model_paths.yaml that cannot be read.
    """
    if root.suffix.lower() in (".yaml", ".yml"):
        return extra_paths(root)
    inside = _existing(root / "models", A1111 | COMFYUI)
    if not inside:  # not an installation, but possibly the models folder of one
        return _unique([*_existing(root, A1111 | COMFYUI), SearchFolder(root)])
    listed = extra_paths(root / EXTRA_PATHS) if _is_file(root / EXTRA_PATHS) else []
    return _unique([*inside, *_existing(root, OUTSIDE_MODELS), *listed])


def _existing(folder: Path, categories: Mapping[str, str]) -> list[SearchFolder]:
    return [SearchFolder(folder / name, category) for name, category in categories.items() if _is_folder(folder / name)]


def extra_paths(path: Path) -> list[SearchFolder]:
    """The folders in a ComfyUI `extra_model_paths.yaml`.

    It has sections, each with a base_path and one key per category, whose value is one folder per line. Raises
    FileError.
    """
    try:
        sections = parse_yaml(read_text(path))
    except MalformedText as error:
        raise FileError(path, f"{error}; expected ComfyUI's {EXTRA_PATHS}") from None
    if not isinstance(sections, dict | None):
        raise FileError(path, f"contains a {type(sections).__name__}; expected sections with base_path and folders")
    first, rest = list[SearchFolder](), list[SearchFolder]()
    for section in (sections or {}).values():
        if isinstance(section, dict):
            default = str(section.get("is_default", "")).lower() == "true"
            try:
                (first if default else rest).extend(_section(section, path.parent))
            except RequestError as error:
                raise FileError(path, str(error)) from None
    return _unique(first + rest)


def _section(section: Mapping[str, Any], yaml_folder: Path) -> Iterator[SearchFolder]:
    base = yaml_folder / _expanded("base_path", section.get("base_path") or "")
    for key, value in section.items():
        if key in COMFYUI and isinstance(value, str):
            for line in filter(None, (line.strip() for line in value.splitlines())):
                yield SearchFolder(base / _expanded(key, line), COMFYUI[key])


def _expanded(key: str, text: object) -> Path:
    if not isinstance(text, str) or "\0" in text:
        raise RequestError(key, "is not a path")
    try:
        return Path(os.path.expandvars(text)).expanduser()
    except RuntimeError:
        raise RequestError(key, "is in the home folder of an unknown user") from None


def _unique(folders: list[SearchFolder]) -> list[SearchFolder]:
    """Each folder once, under the first of its names: some file systems do not distinguish Lora from lora."""
    unique = dict[Path, SearchFolder]()
    for folder in folders:
        unique.setdefault(_real(folder.path) or folder.path, folder)
    return list(unique.values())


def _real(path: Path) -> Path | None:
    """`path` without links; None if it cannot be followed."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None


def hub_candidates(settings: Settings) -> Iterator[Candidate]:
    """Models in the Hugging Face cache: "org/name" for a diffusers folder, "org/name/file" for a file."""
    if settings.hub is None:
        return
    for repository, is_folder in _inside(settings.hub):
        if not is_folder or not re.fullmatch(r"models--.+--.+", repository.name):
            continue
        snapshot = _snapshot(repository)
        if snapshot is None:
            continue
        name = repository.name.removeprefix("models--").replace("--", "/")
        for path in model_files(snapshot):
            if path == snapshot:
                yield Candidate(path, (name, name.split("/")[1]))
            else:
                inner = _names(path, SearchFolder(snapshot))
                yield Candidate(path, (*(f"{name}/{each}" for each in inner[-2:]), *inner[:2]))


def _snapshot(repository: Path) -> Path | None:
    """The folder of the revision that "main" refers to, else of the newest revision."""
    try:
        revision = read_outside(repository / "refs" / "main", 200).decode("ascii").strip()
        # A plain name: a path could lead out of the cache.
        if re.fullmatch(r"[\w-][\w.-]*", revision) and _is_folder(main := repository / "snapshots" / revision):
            return main
    except (OSError, FileError, ValueError):
        pass
    snapshots = [path for path, is_folder in _inside(repository / "snapshots") if is_folder]
    return max(snapshots, key=_modified, default=None)


def model_files(folder: Path, category: str = "", others: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Model files and diffusers folders below `folder`, in name order. Folders that cannot be read are skipped.

    Each folder is searched once, also if several links lead to it. `others` are real paths of folders that are searched
    by themselves, and so not as a part of this one.
    """
    suffixes = SUFFIXES + PICTURE_SUFFIXES if category == "embedding" else SUFFIXES
    if _is_model(folder):
        yield folder
        return
    seen, start = set[Path](), _real(folder)
    waiting = [(folder, 0)]
    while waiting:
        parent, depth = waiting.pop()
        real = _real(parent)
        if real is None or real in seen or (real != start and real in others):
            continue
        seen.add(real)
        below = list[tuple[Path, int]]()
        for path, is_folder in _inside(parent):
            if not is_folder:
                if path.suffix.lower() in suffixes and not _is_preview(path):
                    yield path
            elif _is_diffusers_folder(path):
                yield path
            elif depth < MAX_DEPTH:
                below.append((path, depth + 1))
        waiting += reversed(below)


def _inside(folder: Path) -> list[tuple[Path, bool]]:
    """(path, whether it is a folder), in name order, without hidden ones: trash, downloads, other programs' caches."""
    try:
        with os.scandir(folder) as entries:
            found = [(each.name, _leads_to_folder(each)) for each in entries if not each.name.startswith(".")]
    except OSError:
        return []
    return [(folder / name, is_folder) for name, is_folder in sorted(found)]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_model(path: Path) -> bool:
    return _is_diffusers_folder(path) if _is_folder(path) else path.suffix.lower() in SUFFIXES


def _is_diffusers_folder(path: Path) -> bool:
    return _is_file(path / "model_index.json")


def _is_folder(path: Path) -> bool:
    """False also for a path that is too long, which `Path.is_dir` raises for; `_is_file` likewise."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_preview(path: Path) -> bool:
    """Whether a picture is the preview of a model file with the same name."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return False
    stem = path.stem.removesuffix(".preview")
    return stem != path.stem or any(_is_file(path.with_name(stem + suffix)) for suffix in SUFFIXES)
