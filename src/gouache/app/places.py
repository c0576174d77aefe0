"""Where models lie: our own folders, and those of A1111, ComfyUI and the Hugging Face cache, as they are.

A folder of `settings.models` may be any of these:

    a web UI's installation     models/Stable-diffusion, models/VAE, models/Lora, embeddings, ...   (A1111, Forge)
    ComfyUI's                   models/checkpoints, models/loras, ..., and its extra_model_paths.yaml
    an extra_model_paths.yaml   named by itself
    any other folder            searched whole; what a file is, its content tells, and a folder's name is a hint

Installations are full of files that end in .pt or .bin and are no models, so of them only the known folders count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gouache.app.kinds import A1111
from gouache.app.settings import Settings
from gouache.errors import FileError, printable

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
PICTURES = (".png", ".webp")  # which carry embeddings, in folders of embeddings

# ComfyUI's folders below models/, which are the keys of its extra_model_paths.yaml too.
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
# What stands beside models/ in an installation.
BESIDE = {"embeddings": "embedding", "extensions/sd-webui-controlnet/models": "controlnet"}
EXTRA_PATHS = "extra_model_paths.yaml"


@dataclass(frozen=True)
class Place:
    """A folder to look in. `kind` (as in `app.kinds`) is what its owner keeps there, "" where anything may be."""

    folder: Path
    kind: str = ""


@dataclass(frozen=True)
class Candidate:
    """A file, or a folder of components, that may be a model; `names` by which it can be called, the best first."""

    path: Path
    names: tuple[str, ...]
    kind: str = ""


def candidates(settings: Settings) -> Iterator[Candidate]:
    """Whatever may be a model in all places, in the order of `settings.models`; each path once."""
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
        for place in places_of(root):
            for path in models(place.folder, place.kind):
                yield Candidate(path, _names(path, place.folder), place.kind)
    yield from hub(settings)


def _names(path: Path, folder: Path) -> tuple[str, ...]:
    inner = path.relative_to(folder)
    bare = inner if path.is_dir() else inner.with_suffix("")
    names = (bare.name, inner.name, bare.as_posix(), inner.as_posix())
    return tuple(dict.fromkeys(names))


def places_of(root: Path) -> list[Place]:
    """The places that `root` stands for. Raises FileError for an extra_model_paths.yaml that cannot be read."""
    if root.suffix.lower() in (".yaml", ".yml"):
        return extra_paths(root)
    inside = _kept(root / "models", A1111 | COMFYUI)
    if not inside:  # no installation, though it may be the models folder of one
        return _once([*_kept(root, A1111 | COMFYUI), Place(root)])
    named = extra_paths(root / EXTRA_PATHS) if (root / EXTRA_PATHS).is_file() else []
    return _once([*inside, *_kept(root, BESIDE), *named])


def _kept(folder: Path, kinds: Mapping[str, str]) -> list[Place]:
    return [Place(folder / below, kind) for below, kind in kinds.items() if (folder / below).is_dir()]


def extra_paths(path: Path) -> list[Place]:
    """The places that a ComfyUI `extra_model_paths.yaml` names: sections, base_path, a key a kind, several by lines."""
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FileError(path, f"is not YAML that can be read: {printable(reason)}") from None
    if not isinstance(sections, dict | None):
        raise FileError(path, f"holds a {type(sections).__name__}; expected sections with base_path and folders")
    first, rest = list[Place](), list[Place]()
    for section in (sections or {}).values():
        if isinstance(section, dict):
            default = str(section.get("is_default", "")).lower() == "true"
            (first if default else rest).extend(_section(section, path.parent))
    return _once(first + rest)


def _section(section: Mapping[str, Any], beside: Path) -> Iterator[Place]:
    base = beside / _expanded(str(section.get("base_path") or ""))
    for key, value in section.items():
        if key in COMFYUI and isinstance(value, str):
            for line in filter(None, (line.strip() for line in value.splitlines())):
                yield Place(base / _expanded(line), COMFYUI[key])


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _once(places: list[Place]) -> list[Place]:
    """Each folder once; on a file system that does not tell Lora from lora, under the first of its names."""
    kept = dict[Path, Place]()
    for place in places:
        kept.setdefault(place.folder.resolve(), place)
    return list(kept.values())


def hub(settings: Settings) -> Iterator[Candidate]:
    """Models in the Hugging Face cache, by repository: "org/name" a diffusers folder, "org/name/file" a file."""
    if settings.hub is None:
        return
    for repository in sorted(settings.hub.glob("models--*--*")):
        snapshot = _snapshot(repository)
        if snapshot is None:
            continue
        name = repository.name.removeprefix("models--").replace("--", "/")
        for path in models(snapshot):
            if path == snapshot:
                yield Candidate(path, (name, name.split("/")[1]))
            else:
                inner = _names(path, snapshot)
                yield Candidate(path, (*(f"{name}/{each}" for each in inner[-2:]), *inner[:2]))


def _snapshot(repository: Path) -> Path | None:
    """The revision that "main" points to, else the newest that is there."""
    try:
        named = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="ascii").strip()
        if named.is_dir():
            return named
    except (OSError, ValueError):
        pass
    there = [path for path in repository.glob("snapshots/*") if path.is_dir()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def models(folder: Path, kind: str = "") -> Iterator[Path]:
    """Model files and diffusers folders below `folder`, in name order; what may not be read is passed over."""
    suffixes = SUFFIXES + PICTURES if kind == "embedding" else SUFFIXES
    if _is_model(folder):
        yield folder
    else:
        yield from _below(folder, (), suffixes)


def _below(folder: Path, above: tuple[Path, ...], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """`above` are the folders it stands in, so that a link to one of them ends there."""
    try:
        real = folder.resolve()
        inside = sorted(folder.iterdir()) if real not in above else []
    except OSError:
        return
    for path in inside:
        if path.name.startswith("."):
            continue  # trash, downloads that are not finished, other programs' caches
        if path.is_dir():
            if _is_model(path):
                yield path
            else:
                yield from _below(path, (*above, real), suffixes)
        elif path.suffix.lower() in suffixes and not _is_preview(path):
            yield path


def _is_model(path: Path) -> bool:
    return (path / "model_index.json").is_file() if path.is_dir() else path.suffix.lower() in SUFFIXES


def _is_preview(path: Path) -> bool:
    """A picture that only shows what the file beside it makes."""
    if path.suffix.lower() not in PICTURES:
        return False
    stem = path.stem.removesuffix(".preview")
    return stem != path.stem or any(path.with_name(stem + suffix).is_file() for suffix in SUFFIXES)
