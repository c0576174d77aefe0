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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.app.categories import A1111
from gouache.app.settings import Settings
from gouache.errors import FileError, printable

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
    seen = set[Path]()
    for found in _candidates(settings):
        if found.path not in seen:
            seen.add(found.path)
            yield found


def _candidates(settings: Settings) -> Iterator[Candidate]:
    for root in settings.models:
        if _is_model(root):
            yield Candidate(root, (root.name, root.stem))
            continue
        for folder in search_folders(root):
            for path in model_files(folder.path, folder.category):
                yield Candidate(path, _names(path, folder.path), folder.category)
    yield from hub_candidates(settings)


def _names(path: Path, folder: Path) -> tuple[str, ...]:
    inner = path.relative_to(folder)
    bare = inner if path.is_dir() else inner.with_suffix("")
    names = (bare.name, inner.name, bare.as_posix(), inner.as_posix())
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
    listed = extra_paths(root / EXTRA_PATHS) if (root / EXTRA_PATHS).is_file() else []
    return _unique([*inside, *_existing(root, OUTSIDE_MODELS), *listed])


def _existing(folder: Path, categories: Mapping[str, str]) -> list[SearchFolder]:
    return [SearchFolder(folder / name, category) for name, category in categories.items() if (folder / name).is_dir()]


def extra_paths(path: Path) -> list[SearchFolder]:
    """The folders in a ComfyUI `extra_model_paths.yaml`.

    It has sections, each with a base_path and one key per category, whose value is one folder per line. Raises
    FileError.
    """
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FileError(path, f"cannot be read as YAML: {printable(reason)}") from None
    if not isinstance(sections, dict | None):
        raise FileError(path, f"contains a {type(sections).__name__}; expected sections with base_path and folders")
    first, rest = list[SearchFolder](), list[SearchFolder]()
    for section in (sections or {}).values():
        if isinstance(section, dict):
            default = str(section.get("is_default", "")).lower() == "true"
            (first if default else rest).extend(_section(section, path.parent))
    return _unique(first + rest)


def _section(section: Mapping[str, Any], yaml_folder: Path) -> Iterator[SearchFolder]:
    base = yaml_folder / _expanded(str(section.get("base_path") or ""))
    for key, value in section.items():
        if key in COMFYUI and isinstance(value, str):
            for line in filter(None, (line.strip() for line in value.splitlines())):
                yield SearchFolder(base / _expanded(line), COMFYUI[key])


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _unique(folders: list[SearchFolder]) -> list[SearchFolder]:
    """Each folder once, under the first of its names: some file systems do not distinguish Lora from lora."""
    unique = dict[Path, SearchFolder]()
    for folder in folders:
        unique.setdefault(folder.path.resolve(), folder)
    return list(unique.values())


def hub_candidates(settings: Settings) -> Iterator[Candidate]:
    """Models in the Hugging Face cache: "org/name" for a diffusers folder, "org/name/file" for a file."""
    if settings.hub is None:
        return
    for repository in sorted(settings.hub.glob("models--*--*")):
        snapshot = _snapshot(repository)
        if snapshot is None:
            continue
        name = repository.name.removeprefix("models--").replace("--", "/")
        for path in model_files(snapshot):
            if path == snapshot:
                yield Candidate(path, (name, name.split("/")[1]))
            else:
                inner = _names(path, snapshot)
                yield Candidate(path, (*(f"{name}/{each}" for each in inner[-2:]), *inner[:2]))


def _snapshot(repository: Path) -> Path | None:
    """The folder of the revision that "main" refers to, else of the newest revision."""
    try:
        main = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="ascii").strip()
        if main.is_dir():
            return main
    except (OSError, ValueError):
        pass
    snapshots = [path for path in repository.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def model_files(folder: Path, category: str = "") -> Iterator[Path]:
    """Model files and diffusers folders below `folder`, in name order. Folders that cannot be read are skipped."""
    suffixes = SUFFIXES + PICTURE_SUFFIXES if category == "embedding" else SUFFIXES
    if _is_model(folder):
        yield folder
    else:
        yield from _search(folder, (), suffixes)


def _search(folder: Path, parents: tuple[Path, ...], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """`parents` are the folders that contain `folder`; a link back to one of them is not followed."""
    try:
        real = folder.resolve()
        inside = sorted(folder.iterdir()) if real not in parents else []
    except OSError:
        return
    for path in inside:
        if path.name.startswith("."):
            continue  # trash, unfinished downloads, caches of other programs
        if path.is_dir():
            if _is_model(path):
                yield path
            else:
                yield from _search(path, (*parents, real), suffixes)
        elif path.suffix.lower() in suffixes and not _is_preview(path):
            yield path


def _is_model(path: Path) -> bool:
    return (path / "model_index.json").is_file() if path.is_dir() else path.suffix.lower() in SUFFIXES


def _is_preview(path: Path) -> bool:
    """Whether a picture is the preview of a model file with the same name."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return False
    stem = path.stem.removesuffix(".preview")
    return stem != path.stem or any(path.with_name(stem + suffix).is_file() for suffix in SUFFIXES)
