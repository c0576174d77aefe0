"""Merge any number of models of any layout into one, one tensor at a time.

    open -> identify -> components with the networks' names -> per tensor: read, merge, cast -> single file -> write

A merge depends on nothing but its `Recipe`, which can be written next to the result and reproduces it byte for byte.
Tensors that are not weights of a network (position ids, noise schedules) are copied from the first model unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gouache.errors import DamagedFile, ModelError, RequestError, printable
from gouache.families.family import Family
from gouache.families.found import Found
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.nn.spec import UNetSpec
from gouache.outside import MalformedText, parse_json
from gouache.workshop import derive, layout, save
from gouache.workshop.block_weights import MAX_WEIGHT, Weights, weights
from gouache.workshop.modelspec import describe
from gouache.workshop.progress import OnWork
from gouache.workshop.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from gouache.workshop.methods import Method

_FIRST_CONVOLUTION = "input_blocks.0.0.weight"
_LATENT_CHANNELS = 4  # input channels of a U-Net that receives nothing but the latent
_AT_ONCE = 2**26  # elements in memory at once, all models together; larger tensors are merged in blocks of rows


@dataclass(frozen=True)
class Merged:
    """What was written. `sha256` is that of the file; `left_out` counts, by reason, tensors of the first model that are
    not in the result."""

    tensors: int
    nbytes: int
    sha256: str
    left_out: Mapping[str, int]
    notes: tuple[str, ...]


def merge(
    recipe: Recipe,
    target: Path,
    *,
    hash_of: Callable[[ModelFile], str] = ModelFile.sha256,
    recipe_file: Path | None = None,
    overwrite: bool = False,
    on_work: OnWork | None = None,
) -> Merged:
    """Merge as `recipe` specifies, write the result as `target`, and the recipe as `recipe_file` if that is given.

    `hash_of` returns the SHA-256 of a model file. Raises RequestError, FileError or ModelError before any work starts
    if the models cannot be merged: wrong number of models, different families, incompatible shapes.
    """
    from gouache.workshop.methods import METHODS

    form = save.single_form_of(target)
    save.check_target(target, overwrite)
    if recipe_file is not None:
        save.check_target(recipe_file, overwrite)
        if os.path.realpath(recipe_file) == os.path.realpath(target):  # unlike `resolve`, also of a link to itself
            raise RequestError(
                "recipe", f"{save.shown(recipe_file)} is the file of the merged model; choose another name"
            )
    if recipe.method not in METHODS:
        raise RequestError("method", f"{printable(recipe.method, 40)!r} is not known; use one of {', '.join(METHODS)}")
    method = METHODS[recipe.method]
    _check_numbers(recipe)
    _check_count(recipe, method)
    sides = [_side(Path(model.path)) for model in recipe.models]
    family = _same_family(sides)
    first = sides[0]
    _check_usable(first, recipe)
    names = [*first.parts, *_added(recipe, sides)]
    components = {name: _component(name, recipe, method, sides) for name in names}
    result, dropped = _assembled(sides, family, components)
    hashes = [hash_of(side.file) for side in sides]
    _check_hashes(recipe, hashes)
    known = replace(recipe, models=tuple(replace(model, sha256=digest) for model, digest in zip(recipe.models, hashes)))
    result = derive.cast(result, recipe.dtype)
    metadata = {**result.metadata, **describe(first.found), **_ancestry(known, sides)}
    result = replace(result, metadata=save.without_hashes(metadata))

    def check(path: Path) -> None:
        written = open_model(path)
        if written.tensors != dict(result.tensors):
            raise DamagedFile(path, "the written file does not hold the merged tensors; the disk or memory failed")

    digest = save.write_file(result, target, form, on_work, check, what="merging", overwrite=overwrite)
    if recipe_file is not None:
        with save.writing(recipe_file, overwrite):
            known.write(recipe_file, new=not overwrite)
    return Merged(len(result), result.nbytes, digest, dropped, tuple(_notes(sides, components)))


# ---- the models


@dataclass(frozen=True)
class _Side:
    """One of the models, with its components under the names of their networks."""

    file: ModelFile
    found: Found
    parts: Mapping[str, ModelFile]


def _side(path: Path) -> _Side:
    file, found = layout.opened(path)
    if not found.components:
        raise ModelError(
            f"{printable(str(path))} is not a model or a component of one (kind: {found.kind.value}); for LoRAs use "
            "`gouache lora merge`, for embeddings `gouache embedding merge`"
        )
    parts = {name: derive.arrange(file, part.origins) for name, part in found.components.items()}
    return _Side(file, found, parts)


def _check_usable(first: _Side, recipe: Recipe) -> None:
    """ModelError if the first model has a component that cannot be merged, which would be copied from it unmerged.

    A VAE is copied anyway unless `recipe` says otherwise.
    """
    for name, reason in first.found.unusable.items():
        if name != "vae" or recipe.vae != "a":
            raise ModelError(f"{_name(first)} has no usable {name} to merge ({reason})")


def _check_numbers(recipe: Recipe) -> None:
    """RequestError for numbers that would make every weight NaN, or that no method accepts."""
    for name in ("alpha", "beta"):
        if not abs(getattr(recipe, name)) <= MAX_WEIGHT:
            raise RequestError(name, f"is {_short(getattr(recipe, name))}; expected a number up to {MAX_WEIGHT:g}")
    if not 0 < recipe.density <= 1:
        raise RequestError("density", f"is {_short(recipe.density)}; expected a share above 0, at most 1")
    if not 0 <= recipe.epsilon <= 1:
        raise RequestError("epsilon", f"is {_short(recipe.epsilon)}; expected a number from 0 to 1")
    if recipe.rank < 1:
        raise RequestError("rank", f"is {recipe.rank}; expected at least 1")


def _short(number: float) -> str:
    """A number for a message; an integer of a recipe can have thousands of digits."""
    return printable(str(number), 40)


def _check_count(recipe: Recipe, method: Method) -> None:
    fewest, most = method.inputs
    if not fewest <= len(recipe.models) <= most:
        needed = str(fewest) if fewest == most else f"{fewest} to {most}"
        order = ", the first of them the base that the others were fine-tuned from" if method.base else ""
        raise RequestError("models", f"{recipe.method} needs {needed} models{order}; got {len(recipe.models)}")


def _same_family(sides: Sequence[_Side]) -> Family | None:
    first = sides[0].found.family.value
    for side in sides[1:]:
        other = side.found.family.value
        if other is not first:
            raise ModelError(
                f"{_name(side)} is {other.title if other else 'of no known family'} and {_name(sides[0])} is "
                f"{first.title if first else 'of no known family'}: models of different families cannot be merged"
            )
    return first


def _name(side: _Side) -> str:
    return save.shown(side.file.path)


def _file_name(side: _Side) -> str:
    return printable(side.file.path.name)


def _notes(sides: Sequence[_Side], components: Collection[str]) -> list[str]:
    """Differences of the models that a merge does not resolve."""
    notes = list[str]()
    predictions = {side.found.prediction.value for side in sides if side.found.prediction is not None}
    if len(predictions) > 1:
        types = ", ".join(sorted(predictions))
        notes.append(f"the models have different prediction types ({types}); the merged model may not work")
    first = sides[0]
    if "vae" in first.found.unusable:
        notes.append(
            f"{_file_name(first)}: its VAE is copied as it is, but it cannot be used: {first.found.missing['vae']}"
        )
    for name in dict.fromkeys(name for side in sides[1:] for name in side.parts if name not in components):
        notes.append(f"{_file_name(first)}: it has no {name}, so the merged model has none")
    for side in sides:
        notes += [f"{_file_name(side)}: {printable(note, 400)}" for note in side.file.notes]
        if side.found.ema_names:
            notes.append(f"{_file_name(side)}: its EMA weights were left out; they are meaningless after a merge")
    return notes


# ---- the merge


def _component(name: str, recipe: Recipe, method: Method, sides: Sequence[_Side]) -> ModelFile:
    """One component of the result under the network's names: merged, or copied from one model."""
    mode = recipe.vae if name == "vae" else recipe.text if name.startswith("text_encoder") else "merge"
    if mode != "merge":
        chosen = sides[_model_index(mode, name, len(sides))]
        if name not in chosen.parts:
            reason = chosen.found.missing.get(name, "it is not in the file")
            raise ModelError(f"{_name(chosen)} has no usable {name}: {reason}")
        return chosen.parts[name]
    absent = [side for side in sides if name not in side.parts]
    if absent:
        raise ModelError(
            f"{_name(absent[0])} has no usable {name} to merge "
            f"({absent[0].found.missing.get(name, 'it is not in the file')})"
        )
    parts = [side.parts[name] for side in sides]
    _check_shapes(name, parts)
    spec = sides[0].found.components[name].spec
    by_block = {
        knob: weights(
            getattr(recipe, knob),
            recipe.blocks.get(knob) if name == "unet" or knob in recipe.blocks else None,
            _unet_spec(sides[0], spec),
            recipe.rules.get(knob, ()),
        )
        for knob in ("alpha", "beta")
    }
    infos = parts[0].tensors
    return derive.make(
        parts[0], infos, lambda key: _merged(key, name == "unet", recipe, method, parts, by_block, infos[key])
    )


def _unet_spec(side: _Side, spec: object) -> UNetSpec | None:
    part = side.found.components.get("unet")
    return part.spec if part is not None and isinstance(part.spec, UNetSpec) else None


def _added(recipe: Recipe, sides: Sequence[_Side]) -> list[str]:
    """The components that the first model does not have and that `recipe` copies from another one."""
    modes = {"vae": recipe.vae, "text_encoder": recipe.text, "text_encoder_2": recipe.text}
    chosen = {name: sides[_model_index(mode, name, len(sides))] for name, mode in modes.items() if mode != "merge"}
    return [name for name, side in chosen.items() if name in sides[0].found.absent and name in side.parts]


def _model_index(letter: str, name: str, count: int) -> int:
    """The index of the model called `letter` (a, b, ...), from which the component `name` is copied."""
    index = ord(letter) - ord("a") if len(letter) == 1 else -1
    if not 0 <= index < count:
        letters = ", ".join(chr(ord("a") + number) for number in range(count))
        letter = printable(letter, 40)
        raise RequestError("vae" if name == "vae" else "text", f"{letter!r} is not known; use merge, {letters}")
    return index


def _check_shapes(component: str, parts: Sequence[ModelFile]) -> None:
    """ModelError unless all shapes are equal, or only the first convolution differs: the first model's has the input
    channels of a variant (inpainting, editing, depth), and the other one's those of the latent alone."""
    first = parts[0]
    for other in parts[1:]:
        one, two = save.shown(first.path), save.shown(other.path)
        if missing := sorted(set(first) ^ set(other)):
            raise ModelError(
                f"{one} and {two} cannot be merged: {component} tensor {printable(missing[0])} is only in one of them"
            )
        for name, info in first.tensors.items():
            a, b = info.shape, other.tensors[name].shape
            if a == b:
                continue
            if name == _FIRST_CONVOLUTION and a[0] == b[0] and a[2:] == b[2:]:
                if a[1] > b[1] == _LATENT_CHANNELS:
                    continue
                if b[1] > a[1] == _LATENT_CHANNELS:
                    raise ModelError(
                        f"{two} has {b[1]} input channels and {one} has {a[1]}: give the inpainting (or edit, or "
                        "depth) model first, so that the result is one"
                    )
                raise ModelError(
                    f"{one} and {two} cannot be merged: the U-Nets have {a[1]} and {b[1]} input channels, which are "
                    "those of different variants (inpainting, edit, depth)"
                )
            raise ModelError(
                f"{one} and {two} cannot be merged: {component} tensor {printable(name)} has shape {list(a)} in the "
                f"first and {list(b)} in the second"
            )


def _merged(
    name: str,
    in_unet: bool,
    recipe: Recipe,
    method: Method,
    parts: Sequence[ModelFile],
    by_block: Mapping[str, Weights],
    info: TensorInfo,
) -> Tensor:
    """One tensor of the result, in the dtype of the first model."""
    import torch

    from gouache.files.source import TORCH_NAMES
    from gouache.workshop.methods import Knobs

    tensors = [part.read(name) for part in parts]
    inside = name if in_unet else None
    knobs = Knobs(
        alpha=by_block["alpha"].of(name, inside),
        beta=by_block["beta"].of(name, inside),
        density=recipe.density,
        epsilon=recipe.epsilon,
        rank=recipe.rank,
        seed=recipe.seed,
        name=name,
    )
    with torch.inference_mode():
        shared = min(each.shape[1] for each in tensors) if name == _FIRST_CONVOLUTION else None
        extra = None
        if shared is not None and tensors[0].shape[1] > shared:
            # Input channels that only the first model has (mask, masked picture, depth) keep its weights.
            extra = tensors[0][:, shared:].float()
            tensors = [each[:, :shared] for each in tensors]
        rows = max(
            1,
            _AT_ONCE
            * max(1, tensors[0].shape[0] if tensors[0].ndim else 1)
            // max(1, len(tensors) * tensors[0].numel()),
        )
        if not tensors[0].ndim or rows >= tensors[0].shape[0]:
            result = method.merge([each.float() for each in tensors], knobs)
        else:
            pieces = []
            for number, at in enumerate(range(0, tensors[0].shape[0], rows)):
                part = replace(knobs, name=f"{name}#{number}")
                pieces.append(method.merge([each[at : at + rows].float() for each in tensors], part))
            result = torch.cat(pieces)
        if extra is not None:
            result = torch.cat([result, extra], dim=1)
        if not derive.all_finite(result):
            raise ModelError(
                f"{printable(name)} is NaN or infinite after merging; look for damaged models with "
                "`gouache inspect --deep`"
            )
        return result.to(getattr(torch, TORCH_NAMES[info.dtype]))


# ---- the result


def _assembled(
    sides: Sequence[_Side], family: Family | None, components: Mapping[str, ModelFile]
) -> tuple[ModelFile, dict[str, int]]:
    """The components under the names of the first model that has them, with the other tensors of the first model except
    EMA weights; and what was left out, counted by reason."""
    first = sides[0]
    stored = {name: next(side for side in sides if name in side.parts).found.components[name] for name in components}
    parts = [layout.as_in(stored[name], part, family) for name, part in components.items()]
    used = {
        source
        for part in first.found.components.values()
        for origin in part.origins.values()
        for source in origin.sources
    }
    averages = {name for name in first.file if name.startswith(layout.AVERAGES) and name not in used}
    rest = [name for name in first.file if name not in used and name not in averages]
    base = replace(derive.keep(first.file, rest), extra=save.plain_values(first.file.extra))
    result = derive.join(base, *parts)
    return result, {"EMA weights, which are meaningless after a merge": len(averages)} if averages else {}


def _check_hashes(recipe: Recipe, hashes: Sequence[str]) -> None:
    for model, digest in zip(recipe.models, hashes):
        if model.sha256 and model.sha256 != digest:
            raise ModelError(
                f"{printable(model.path)} is not the file that the recipe was made with: its SHA-256 is "
                f"{digest[:10]}..., the recipe has {printable(model.sha256[:10])}..."
            )


def _ancestry(recipe: Recipe, sides: Sequence[_Side]) -> dict[str, str]:
    """The recipe and the models it was made from, with their own ancestors, under A1111's and ModelSpec's keys."""
    models: dict[str, Any] = {}
    for model, side in zip(recipe.models, sides):
        for key in ("sd_merge_models", "sd_merge_recipe"):
            try:
                earlier = parse_json(side.file.metadata.get(key, "null"))
            except MalformedText:
                continue
            if key == "sd_merge_models" and isinstance(earlier, dict):
                models = {**earlier, **models}
            elif isinstance(earlier, dict):
                models.setdefault(model.sha256, {})["sd_merge_recipe"] = earlier
        models.setdefault(model.sha256, {})["name"] = Path(model.path).name
    return {
        "sd_merge_recipe": json.dumps({"type": "gouache", **recipe.to_json()}, sort_keys=True),
        "sd_merge_models": json.dumps(models, sort_keys=True),
        "modelspec.merged_from": ", ".join(Path(model.path).stem for model in recipe.models),
    }
