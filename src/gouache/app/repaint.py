"""A picture made again from the recipe in its own file, and compared with it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gouache.adapters.strength import from_json
from gouache.app import hashes, names
from gouache.app.settings import Settings
from gouache.app.shelf import RecordedShelf
from gouache.diffusion.samplers.sampler import OnStep
from gouache.errors import RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate import run
from gouache.generate.picture import Picture, read_recipe
from gouache.generate.request import Request
from gouache.generate.source import sha256
from gouache.model import load, residency
from gouache.model.splice import attach
from gouache.version import __version__


@dataclass(frozen=True)
class Repainted:
    """`share` of the pixels differ, by at most `largest` of 255 levels; `causes` are what was not the same."""

    picture: Picture
    share: float
    largest: int
    causes: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return self.largest == 0


def repaint(
    path: Path,
    settings: Settings,
    *,
    model: str | None = None,
    device: str | None = None,
    on_step: OnStep | None = None,
) -> Repainted:
    """Paint the picture at `path` again, with the recipe's model, device and dtype unless told otherwise.

    Raises RequestError where the file has no recipe, or a file that it names is gone.
    """
    recipe, before = read_recipe(path)
    request = Request.from_json(recipe["request"])
    file = open_model(_model(recipe, model, settings))
    digest = hashes.sha256(file, settings)
    place = residency.device(device or recipe.get("device"))
    told = recipe.get("model", {})
    found = identify(file, prediction=told.get("prediction"), family=told.get("family"))
    shelf = RecordedShelf(settings, recipe.get("splices", []))
    other = None
    if (vae := shelf.vae()) is not None:
        opened = open_model(vae)
        other = opened, identify(opened)
    loaded = load.load(file, found, device=place, dtype=residency.dtype(recipe.get("dtype", "fp32")), vae=other)
    for stage in recipe.get("upcast", []):
        if stage in ("text encoder", "U-Net", "VAE"):
            loaded.widen(stage)
    for adapter, strength, how in shelf.by_hand():
        attach(
            loaded, open_model(adapter), from_json(strength, loaded.unet.spec), how="live" if how == "live" else None
        )
    picture = next(iter(run.paint(loaded, request, model_hash=digest, shelf=shelf, on_step=on_step)))
    if picture.image.size != before.size:
        size = f"{before.width}x{before.height}"
        raise RequestError("picture", f"{path} was cut or scaled to {size} after it was painted")
    difference = np.abs(np.asarray(picture.image, np.int16) - np.asarray(before, np.int16))
    causes = tuple(_causes(recipe, request, picture, digest, place, loaded.upcast)) if difference.any() else ()
    return Repainted(picture, float(difference.any(axis=2).mean()), int(difference.max()), causes)


def _model(recipe: dict[str, Any], model: str | None, settings: Settings) -> Path:
    """The model named now, else the recipe's path, else its name, with its hash for when it was renamed."""
    if model is not None:
        return names.resolve(model, settings)
    told = recipe.get("model", {})
    if told.get("path") and Path(told["path"]).exists():
        return Path(told["path"])
    if told.get("name"):
        try:
            return names.resolve(told["name"], settings)
        except RequestError:
            if not told.get("sha256"):
                raise
            return names.resolve(f"{told['name']} [{told['sha256']}]", settings)
    raise RequestError("model", "the recipe names none; name it with --model")


def _causes(
    recipe: dict[str, Any], request: Request, picture: Picture, digest: str, device: torch.device, upcast: list[str]
) -> Iterator[str]:
    """What is not as it was, the likeliest cause of a difference first."""
    told = recipe.get("model", {})
    if told.get("sha256") not in (None, digest):
        yield f"the model file is another: {told['sha256'][:10]} then, {digest[:10]} now"
    for name, then in recipe.get("inputs", {}).items():
        path = getattr(request, name, None)
        now = sha256(path) if path is not None and path.is_file() else "gone"
        if then != now:
            yield f"the picture given as {name} is another: {then[:10]} then, {now[:10]} now"
    for then, now in zip(recipe.get("splices", []), picture.recipe["splices"]):
        if then.get("sha256") != now["sha256"]:
            was, digest = str(then.get("sha256"))[:10], now["sha256"][:10]
            yield f"the {now['kind']} {now['name']} is another: {was} then, {digest} now"
    if recipe.get("device") != device.type:
        yield f"painted on {recipe.get('device')} then, {device.type} now"
    if sorted(recipe.get("upcast", [])) != sorted(upcast):
        yield f"computed in float32: {recipe.get('upcast')} then, {upcast} now"
    now = {"gouache": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, version in recipe.get("versions", {}).items():
        if now.get(name) != version:
            yield f"{name} {version} then, {now.get(name)} now"
    if recipe.get("batch", 1) != 1:
        yield f"painted in a batch of {recipe['batch']}, which may round otherwise"
    yield "the number of threads or the kind of processor may be another: they round differently"
