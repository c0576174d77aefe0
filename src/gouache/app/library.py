"""Names to model files: "mini", a path, or the name of a file or folder in one of the model folders."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from gouache.app.settings import Settings
from gouache.errors import RequestError, printable
from gouache.files.record import ModelFile
from gouache.files.write import write_atomic

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
DEFAULT = "mini"


def resolve(name: str, settings: Settings) -> Path:
    """The file or folder that `name` means. Raises RequestError with the nearest names where there is none."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError):
        pass  # too long for a path, or in the home of nobody known
    inside = embedded(name)
    if inside is not None:
        return inside
    known = dict[str, Path]()
    for folder in settings.models:
        for candidate in models(folder):
            inner = candidate.relative_to(folder)
            for called in (candidate.name, candidate.stem, inner.as_posix(), inner.with_suffix("").as_posix()):
                known.setdefault(called, candidate)
    if name in known:
        return known[name]
    name = printable(name)
    near = difflib.get_close_matches(name, [*known, DEFAULT], n=3)
    hint = f"the nearest are {', '.join(near)}" if near else f"looked in {', '.join(map(str, settings.models))}"
    raise RequestError("model", f"there is no file {name!r} and no model of that name; {hint}")


def embedded(name: str) -> Path | None:
    """The model `name` inside the package, if there is one."""
    return next((path for path in EMBEDDED.glob("*.safetensors") if path.stem == name), None)


def models(folder: Path) -> Iterator[Path]:
    """Model files and diffusers folders below `folder`, in name order; what may not be read is passed over."""
    return _below(folder, ())


def _below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """`above` are the folders it stands in, so that a link to one of them ends there."""
    try:
        real = folder.resolve()
        inside = sorted(folder.iterdir()) if real not in above else []
    except OSError:
        return
    for path in inside:
        if path.is_dir():
            if (path / "model_index.json").is_file():
                yield path
            else:
                yield from _below(path, (*above, real))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def sha256(file: ModelFile, settings: Settings) -> str:
    """The hash of a model file, remembered by path, size and time, because gigabytes take seconds."""
    key = file_key(file.files)
    store = settings.cache / "hashes.json"
    known = read_cache(store)
    if key in known:
        return str(known[key])
    digest = file.sha256()
    write_cache(store, {**known, key: digest})
    return digest


def file_key(paths: Iterable[Path]) -> str:
    """What tells files from others and from what they were before: paths, sizes, times."""
    return "|".join(f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in sorted(paths))


def read_cache(path: Path) -> dict[str, object]:
    """A JSON object kept in the cache folder; empty where there is none, or a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def write_cache(path: Path, values: dict[str, object]) -> None:
    """Keep `values`; a cache folder that cannot be written costs time next time and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(values, indent=1).encode())
    except OSError:
        return
