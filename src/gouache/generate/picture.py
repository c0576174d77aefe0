"""Picture: what was painted, with the recipe that paints it again, and how both become one PNG file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from gouache.errors import FileError, RequestError
from gouache.files.write import write_atomic

RECIPE_KEY = "gouache"
PARAMETERS_KEY = "parameters"


@dataclass(frozen=True)
class Picture:
    """One painted picture.

    `image` is RGB. `latent` (C, h, w) float32 is what was decoded. `recipe` is all it takes to paint it again, as JSON
    can say it; `parameters` the same in A1111's words.
    """

    image: Image.Image
    latent: Tensor = field(repr=False)
    seed: int
    recipe: Mapping[str, Any] = field(repr=False)
    parameters: str = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write a PNG with its recipe inside, whole or not at all; other suffixes are refused."""
        path = Path(path)
        if path.suffix.lower() not in (".png", ""):
            raise RequestError(
                "output", f"{path} does not end in .png; pictures are saved as PNG, which keeps all of them"
            )
        path = path if path.suffix else path.with_suffix(".png")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(path.parent, f"cannot be made a folder for pictures: {error.strerror}") from None
        texts = PngInfo()
        _add(texts, PARAMETERS_KEY, self.parameters)
        _add(texts, RECIPE_KEY, json.dumps(self.recipe, ensure_ascii=False))
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", pnginfo=texts)
        write_atomic(path, buffer.getvalue())
        return path


def read_recipe(path: Path) -> tuple[dict[str, Any], Image.Image]:
    """The recipe in a PNG that Gouache saved, and its picture. Raises RequestError where there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            texts = dict(opened.text)  # type: ignore[attr-defined]
            picture = opened.convert("RGB")
    except FileNotFoundError:
        raise RequestError("picture", f"there is no file {path}") from None
    except (OSError, ValueError, AttributeError):
        raise RequestError("picture", f"{path} is not a PNG that can be read") from None
    if RECIPE_KEY not in texts:
        other = "; it holds another program's parameters" if PARAMETERS_KEY in texts else ""
        raise RequestError("picture", f"{path} holds no recipe of Gouache's{other}")
    try:
        recipe = json.loads(texts[RECIPE_KEY])
    except (ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict) or not _has_form(recipe):
        raise RequestError("picture", f"{path}: its recipe is damaged")
    return recipe, picture


def _has_form(recipe: dict[str, Any]) -> bool:
    """Whether each part that a recipe has is of its kind; pictures come from anybody."""
    texts = [recipe.get(name, "") for name in ("device", "dtype")]
    for name in ("model", "inputs", "versions"):
        part = recipe.get(name, {})
        if not isinstance(part, dict):
            return False
        texts += part.values()
    splices = recipe.get("splices", [])
    if not isinstance(splices, list) or not all(isinstance(each, dict) for each in splices):
        return False
    texts += [each.get(name) for each in splices for name in ("kind", "name", "told", "path", "sha256")]
    upcast = recipe.get("upcast", [])
    if not isinstance(upcast, list) or not isinstance(recipe.get("request"), dict):
        return False
    return all(text is None or isinstance(text, str) for text in [*texts, *upcast])


def _add(texts: PngInfo, key: str, text: str) -> None:
    """As plain text where Latin-1 can say it, which every reader knows, else as the international form."""
    try:
        text.encode("latin-1")
        texts.add_text(key, text)
    except UnicodeEncodeError:
        texts.add_itxt(key, text)
