"""Recipe: everything that the result of a merge depends on. It can be written as TOML, edited, read and run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gouache.errors import FileError, printable
from gouache.files.write import write_atomic, write_new
from gouache.outside import MalformedText, parse_toml, read_text


@dataclass(frozen=True)
class Source:
    """A model of a merge. `sha256`, if given, must be that of the file."""

    path: str
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`method`: a key of `methods.METHODS`; `models` in the order it expects. `alpha`, `beta`: for all tensors without
    a block weight or a rule.

    `blocks`: {"alpha": preset, numbers, or file}, see `block_weights`. `rules`: {"alpha": ("PATTERN=NUMBER",)}.
    `density`, `epsilon`, `rank`, `seed`: see `methods.Knobs`. `vae`, `text`: "merge", or the letter of the model from
    which the component is copied. `dtype`: of the result, None for that of the first model.
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

    def write(self, path: Path, *, new: bool = False) -> None:
        """Write the recipe as TOML, completely or not at all; `new`: FileExistsError if the file exists."""
        values = {name: getattr(self, name) for name in (each.name for each in fields(self))}
        lines = ["# To run this merge again: gouache merge THIS_FILE OUT.safetensors"]
        for name, value in values.items():
            if isinstance(value, str | int | float):
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        for table in ("blocks", "rules"):
            if values[table]:
                lines += ["", f"[{table}]"]
                lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values[table].items()]
        for model in self.models:
            lines += ["", "[[models]]", f"path = {json.dumps(model.path, ensure_ascii=False)}"]
            lines += [f'sha256 = "{model.sha256}"'] if model.sha256 else []
        (write_new if new else write_atomic)(path, ("\n".join(lines) + "\n").encode())


def read(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises FileError for an unknown key or a value of the wrong type."""
    try:
        values = parse_toml(read_text(path))
    except MalformedText as error:
        raise FileError(path, f"is not a merge recipe: it {error}") from None
    types: dict[str, Any] = {
        "method": str, "alpha": (int, float), "beta": (int, float), "density": (int, float), "epsilon": (int, float),
        "rank": int, "seed": int, "vae": str, "text": str, "dtype": str, "blocks": dict, "rules": dict, "models": list,
    }  # fmt: skip
    for key, value in values.items():
        if key not in types:
            raise FileError(path, f"has the unknown key {printable(key, 60)!r}; a recipe's keys are {', '.join(types)}")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise FileError(path, f"has {key} = {printable(repr(value), 80)}, which is of the wrong type")
    if abs(values.get("seed", 0)) >= 2**64 or abs(values.get("rank", 0)) >= 2**31:
        raise FileError(path, "has a seed or rank that is too large")
    models = values.pop("models", [])
    if not all(isinstance(each, dict) and isinstance(each.get("path"), str) for each in models):
        raise FileError(path, "has a [[models]] table without a path")
    for table, kind in (("blocks", str), ("rules", list)):
        for key, value in values.get(table, {}).items():
            if key not in ("alpha", "beta") or not isinstance(value, kind):
                raise FileError(
                    path, f"has {table}.{printable(key, 60)}, expected alpha or beta, as text or a list of texts"
                )
    rules = {key: tuple(map(str, value)) for key, value in values.pop("rules", {}).items()}
    sources = tuple(Source(_model_path(path, each["path"]), str(each.get("sha256", ""))) for each in models)
    return Recipe(**values, models=sources, rules=rules)


def _model_path(recipe: Path, model: str) -> str:
    """`model` relative to the working directory, or, if it does not exist there, to the folder of the recipe."""
    next_to_recipe = recipe.parent / model
    try:
        return str(next_to_recipe) if not Path(model).exists() and next_to_recipe.exists() else model
    except (OSError, ValueError):  # not a possible file name
        raise FileError(
            recipe, f"names the model {printable(model, 60)!r}, which is not a possible file name"
        ) from None
