"""A merge as a value: everything its result depends on. As TOML it can be kept, read, changed and carried out again."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gouache.errors import FileError
from gouache.files.write import write_atomic


@dataclass(frozen=True)
class Source:
    """A model of a merge. `sha256`, where it is stated, must be that of the file."""

    path: str
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`method`: a name of `methods.METHODS`; `models` in its order. `alpha`, `beta`: for what no block or rule says.

    `blocks`: {"alpha": preset, row of numbers, or file}, see `block_weights`. `rules`: {"alpha": ("PATTERN=NUMBER",)}.
    `density`, `epsilon`, `rank`, `seed`: see `methods.Knobs`. `vae`, `text`: "merge", or the letter of the model from
    which it is taken whole. `dtype`: of the result, None for that of the first model.
    """

    method: str = "weighted-sum"
    models: tuple[Source, ...] = ()
    alpha: float = 0.5
    beta: float = 0.5
    density: float = 0.2
    epsilon: float = 0.1
    rank: int = 64
    seed: int = 0
    vae: str = "a"
    text: str = "merge"
    dtype: str | None = None
    blocks: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["models"] = [{"name": Path(model.path).name, "sha256": model.sha256} for model in self.models]
        return values

    def write(self, path: Path) -> None:
        """As TOML, whole or not at all."""
        plain = {name: getattr(self, name) for name in (each.name for each in fields(self))}
        lines = ["# Carried out again by: gouache merge THIS_FILE OUT.safetensors"]
        for name, value in plain.items():
            if isinstance(value, str | int | float):
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        for table in ("blocks", "rules"):
            if plain[table]:
                lines += ["", f"[{table}]"]
                lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain[table].items()]
        for model in self.models:
            lines += ["", "[[models]]", f"path = {json.dumps(model.path, ensure_ascii=False)}"]
            lines += [f'sha256 = "{model.sha256}"'] if model.sha256 else []
        write_atomic(path, ("\n".join(lines) + "\n").encode())


def read(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises FileError naming the key that is not known, or not of its kind."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(path, f"is not a recipe: {error}") from None
    kinds: dict[str, Any] = {
        "method": str, "alpha": (int, float), "beta": (int, float), "density": (int, float), "epsilon": (int, float),
        "rank": int, "seed": int, "vae": str, "text": str, "dtype": str, "blocks": dict, "rules": dict, "models": list,
    }  # fmt: skip
    for key, value in said.items():
        if key not in kinds:
            raise FileError(path, f"says {key!r}, which is no part of a recipe; there are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise FileError(path, f"says {key} = {value!r}, which is not of the kind that belongs there")
    models = said.pop("models", [])
    if not all(isinstance(each, dict) and isinstance(each.get("path"), str) for each in models):
        raise FileError(path, "has a [[models]] without a path")
    rules = {key: tuple(map(str, value)) for key, value in said.pop("rules", {}).items() if isinstance(value, list)}
    sources = tuple(Source(_beside(path, each["path"]), str(each.get("sha256", ""))) for each in models)
    return Recipe(**said, models=sources, rules=rules)


def _beside(recipe: Path, model: str) -> str:
    """Paths are meant from where the command runs; one that is not there, from where the recipe lies."""
    beside = recipe.parent / model
    return str(beside) if not Path(model).exists() and beside.exists() else model
