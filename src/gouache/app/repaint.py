"""A picture made again from the recipe in its own file, and compared with it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gouache.adapters.strength import from_json
from gouache.app import hashes, names, recorded
from gouache.app.recorded import RecordedSource
from gouache.app.settings import Settings
from gouache.diffusion.samplers.sampler import OnStep
from gouache.errors import RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate import run
from gouache.generate.picture import Picture, read_recipe
from gouache.generate.request import IMAGES, SEEDS, Request
from gouache.images.input_image import ImageLike
from gouache.model import load, residency
from gouache.model.attach import attach
from gouache.model.model import Model
from gouache.version import __version__

MAX_BATCH = 16  # pictures; a larger batch is not painted again for one of them
ROUNDING = 2  # levels of 255
FEW = 0.05  # share of the pixels


@dataclass(frozen=True)
class Repainted:
    """`share` of the pixels differ, by at most `largest` of 255 levels; `causes` are possible reasons.

    A picture of a batch is compared with the same picture of the same batch if, painted alone, it differs.
    """

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
    images: Mapping[str, ImageLike] | None = None,
    device: str | None = None,
    allow_paths: bool = False,
    on_step: OnStep | None = None,
) -> Repainted:
    """Make the picture at `path` again, with the recipe's model, pictures, device and dtype unless others are given.

    `images` maps init, mask or depth to the picture to use. Files at the recipe's paths are opened only if they have
    the recipe's hashes, or `allow_paths` is true. Raises RequestError if the file has no recipe, or a file that the
    recipe names is not found.
    """
    recipe, before = read_recipe(path)
    request = _request(recipe, images or {}, path.parent, allow_paths)
    target = residency.device(device or recipe.get("device"))
    dtype = residency.dtype(recipe.get("dtype", "fp32"))
    source = RecordedSource(settings, recipe.get("adapters", []), allow_paths)
    about = recipe.get("model", {})
    file = names.resolve(model, settings) if model else recorded.model_path(about, "model", settings, allow_paths)
    loaded = _load(file, about, target, dtype, source.vae())
    for stage in recipe.get("upcast", []):
        if stage in ("text encoder", "U-Net", "VAE"):
            loaded.widen(stage)
    for adapter, strength, how in source.attached_before():
        attach(
            loaded, open_model(adapter), from_json(strength, loaded.unet.spec), how="live" if how == "live" else None
        )

    def load_refiner(name: str) -> Model:
        about = {"name": name, **recipe.get("refiner", {})}
        return _load(recorded.model_path(about, "refiner", settings, allow_paths), about, target, dtype, None)

    def hash_of(used: Model) -> str:
        return hashes.sha256(used.file, settings)

    def paint(request: Request, index: int) -> tuple[Picture, np.ndarray]:
        """Picture number `index`, and by how much it differs."""
        pictures = run.paint(loaded, request, hash_of=hash_of, source=source, load=load_refiner, on_step=on_step)
        picture = next(islice(pictures, index, None))
        if picture.image.size != before.size:
            size = f"{before.width}x{before.height}"
            raise RequestError("picture", f"{path} was cut or scaled to {size} after it was made")
        return picture, np.abs(np.asarray(picture.image, np.int16) - np.asarray(before, np.int16))

    picture, difference = paint(request, 0)
    if not difference.any():
        return Repainted(picture, 0.0, 0, ())
    causes = list(_causes(recipe, request, picture, target, loaded.upcast))
    batch = _batch(recipe)
    if batch is not None and not causes and request.seed is not None:
        picture, difference = paint(_whole_batch(request, *batch), batch[1])
    elif (size := recipe.get("batch_size", recipe.get("batch", 1))) != 1:
        causes.append(f"made in a batch of {printable(str(size), 20)}, which may round differently")
    share, largest = float(difference.any(axis=2).mean()), int(difference.max())
    if largest > 0:
        causes += _causes_by_size(share, largest, certain=bool(causes))
    return Repainted(picture, share, largest, tuple(causes))


def _batch(recipe: Mapping[str, Any]) -> tuple[int, int] | None:
    """(size of the batch, index in it) if it is small enough to be painted again; older recipes have no index."""
    batch, index = recipe.get("batch_size"), recipe.get("batch_index")
    if type(batch) is int and type(index) is int and 0 <= index < batch and 1 < batch <= MAX_BATCH:
        return batch, index
    return None


def _whole_batch(request: Request, batch: int, index: int) -> Request:
    """The request that painted the batch; the picture's own `request` has its seed."""
    before = {
        name: (seed - index) % SEEDS
        for name in ("seed", "variation_seed")
        if (seed := getattr(request, name)) is not None
    }
    return replace(request, count=batch, batch=batch, **before)


def _load(path: Path, about: Mapping[str, Any], device: torch.device, dtype: torch.dtype, vae: Path | None) -> Model:
    file = open_model(path)
    found = identify(file, prediction=about.get("prediction"), family=about.get("family"))
    other = None
    if vae is not None:
        opened = open_model(vae)
        other = opened, identify(opened)
    return load.load(file, found, device=device, dtype=dtype, vae=other)


def _request(recipe: Mapping[str, Any], images: Mapping[str, ImageLike], folder: Path, allow_paths: bool) -> Request:
    """The recipe's request with its pictures: those in `images`, else those that the recipe names."""
    values, inputs = dict(recipe["request"]), recipe.get("inputs", {})
    for name in IMAGES:
        if name in images:
            values[name] = images[name]
        elif values.get(name) or name in inputs:
            values[name] = recorded.picture(name, values.get(name), inputs.get(name), folder, allow_paths)
    return Request.from_json(values)


def _causes(
    recipe: dict[str, Any], request: Request, picture: Picture, device: torch.device, upcast: list[str]
) -> Iterator[str]:
    """What has changed, the most likely cause of a difference first."""
    for part in ("model", "refiner"):
        was, now = (each.get(part, {}).get("sha256") for each in (recipe, picture.recipe))
        if was not in (None, now):
            yield f"the {part} file is another: {was[:10]} then, {str(now)[:10]} now"
    for name, was in recipe.get("inputs", {}).items():
        image = getattr(request, name, None)
        now = image.sha256 if image is not None else "missing"
        if was != now:
            yield f"the picture given as {name} is another: {was[:10]} then, {now[:10]} now"
    for was, now in zip(recipe.get("adapters", []), picture.recipe["adapters"]):
        if was.get("sha256") != now["sha256"]:
            yield (
                f"the {now['kind']} {now['name']} is another: {str(was.get('sha256'))[:10]} then, "
                f"{now['sha256'][:10]} now"
            )
    if recipe.get("device") != device.type:
        yield f"made on {recipe.get('device')} then, {device.type} now"
    if sorted(recipe.get("upcast", [])) != sorted(upcast):
        yield f"computed in float32: {recipe.get('upcast')} then, {upcast} now"
    versions = {"gouache": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, version in recipe.get("versions", {}).items():
        if versions.get(name) != version:
            yield f"{name} {version} then, {versions.get(name)} now"


def _causes_by_size(share: float, largest: int, certain: bool) -> Iterator[str]:
    """Causes that leave no trace in the recipe. `certain`: another cause is known.

    Another order of additions changes pixels by a level or two, all over the picture.
    """
    few = share < FEW and largest > ROUNDING
    if few or (largest > ROUNDING and not certain):
        yield "the picture was changed after it was made"
    if not few:
        yield "the number of threads or the kind of processor may differ, which changes rounding"
