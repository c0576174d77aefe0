"""Picture: a generated picture with the recipe that reproduces it, and how both become one PNG file."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from gouache.errors import FileError, RequestError, printable
from gouache.files.write import write_atomic, write_new
from gouache.generate.request import IMAGES
from gouache.images import pixels
from gouache.outside import parse_json

RECIPE_KEY = "gouache"
PARAMETERS_KEY = "parameters"


@dataclass(frozen=True)
class Picture:
    """One generated picture.

    `image` is RGB. `latent` (C, h, w) float32 was decoded to it. `recipe` holds all that is needed to reproduce it, as
    JSON values; `parameters` is the same in A1111's format.
    """

    image: Image.Image
    latent: Tensor = field(repr=False)
    seed: int
    recipe: Mapping[str, Any] = field(repr=False)
    parameters: str = field(repr=False)

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path:
        """Write a PNG with its recipe inside, whole or not at all.

        Raises RequestError for another suffix or a folder, FileExistsError if `path` exists and `overwrite` is False.
        """
        if str(path).endswith(("/", os.sep)) or os.path.isdir(path):  # noqa: PTH112  # False for no possible path
            raise RequestError("output", f"{printable(str(path))} is a folder; expected the name of a .png file")
        path = Path(path)
        if path.suffix.lower() not in (".png", ""):
            raise RequestError(
                "output",
                f"{path} does not end in .png; pictures are saved as PNG, which is lossless and holds the recipe",
            )
        path = path if path.suffix else path.with_suffix(".png")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(path.parent, f"cannot be created as a folder for pictures: {error.strerror}") from None
        texts = PngInfo()
        _add(texts, PARAMETERS_KEY, self.parameters)
        recipe = json.dumps(self.recipe, ensure_ascii=False)
        if any("\ud800" <= character <= "\udfff" for character in recipe):  # a file name that is not text
            recipe = json.dumps(self.recipe)
        _add(texts, RECIPE_KEY, recipe)
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", pnginfo=texts)
        (write_atomic if overwrite else write_new)(path, buffer.getvalue())
        return path


def read_recipe(path: Path) -> tuple[dict[str, Any], Image.Image]:
    """The recipe in a PNG that Gouache saved, and the picture. Raises RequestError if there is none."""
    name = printable(str(path))
    data = pixels.read_bytes(path, "picture")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            picture = pixels.normalise(opened, str(path), "picture").convert("RGB")
            texts = dict(opened.text)  # type: ignore[attr-defined]
    except RequestError:
        raise
    except Exception:  # Pillow's decoders raise almost any exception on damaged files
        raise RequestError("picture", f"{name} is not a PNG that can be read") from None
    if RECIPE_KEY not in texts:
        other = "; it has the parameters of another program" if PARAMETERS_KEY in texts else ""
        raise RequestError("picture", f"{name} has no recipe by Gouache{other}")
    try:
        recipe = parse_json(texts[RECIPE_KEY])
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict):
        raise RequestError("picture", f"{name}: its recipe is damaged")
    if "splices" in recipe:  # the name that version 0.1 gave them
        old = recipe.pop("splices")
        recipe["adapters"] = [
            {"setting": each.get("told"), **each} if isinstance(each, dict) else each
            for each in (old if isinstance(old, list) else [old])
        ]
    if not _is_valid(recipe):
        raise RequestError("picture", f"{name}: its recipe is damaged")
    return recipe, picture


def _is_valid(recipe: dict[str, Any]) -> bool:
    """Whether each part of a recipe has its type; pictures come from strangers."""
    texts = [recipe.get(name, "") for name in ("device", "dtype")]
    for name in ("model", "refiner", "inputs", "versions"):
        part = recipe.get(name, {})
        if not isinstance(part, dict):
            return False
        texts += part.values()
    inputs = recipe.get("inputs", {})
    if not inputs.keys() <= set(IMAGES) or not all(isinstance(each, str) for each in inputs.values()):
        return False
    adapters = recipe.get("adapters", [])
    if not isinstance(adapters, list) or not all(isinstance(each, dict) for each in adapters):
        return False
    texts += [each.get(name) for each in adapters for name in ("kind", "name", "setting", "path", "sha256")]
    upcast = recipe.get("upcast", [])
    if not isinstance(upcast, list) or not isinstance(recipe.get("request"), dict):
        return False
    return all(text is None or isinstance(text, str) for text in [*texts, *upcast])


def _add(texts: PngInfo, key: str, text: str) -> None:
    """As a tEXt chunk if Latin-1 has all characters, which every reader knows, else as iTXt."""
    text = text.encode("utf-8", "replace").decode()
    try:
        text.encode("latin-1")
        texts.add_text(key, text)
    except UnicodeEncodeError:
        texts.add_itxt(key, text)
