"""Several models -> one, a tensor at a time, whatever their number and layout.

    open -> identify -> components in the networks' own names -> per tensor: read, merge, cast -> single file -> write

All that a merge depends on is a `Recipe`, which is written beside the result if asked for, and makes the same bytes
again. What is no network's weight (position ids, noise schedules) is taken from the first model, untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gouache.errors import ModelError, RequestError, printable
from gouache.families.family import Family
from gouache.families.found import Found
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.nn.spec import UNetSpec
from gouache.workshop import derive, layout, save
from gouache.workshop.block_weights import Weights, weights
from gouache.workshop.convert import OnWork, progress
from gouache.workshop.modelspec import describe
from gouache.workshop.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from gouache.workshop.methods import Method

_FIRST_CONVOLUTION = "input_blocks.0.0.weight"
_AT_ONCE = 2**26  # elements of all models together that are in memory; larger tensors are merged in blocks of rows


@dataclass(frozen=True)
class Merged:
    """What was written. `sha256` is that of the file; `left_out` counts what was in the first model and is not here."""

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
    """Carry `recipe` out and write the result as `target`, and the recipe, if asked for, as `recipe_file`.

    `hash_of` gives the SHA-256 of a model file. Raises RequestError, FileError or ModelError, before any work starts,
    for what cannot be merged: another number of models, other families, shapes that do not fit.
    """
    from gouache.workshop.methods import METHODS

    form = save.single_form_of(target)
    save.refuse_existing(target, overwrite)
    if recipe.method not in METHODS:
        raise RequestError("method", f"{recipe.method!r} is not known; there are {', '.join(METHODS)}")
    method = METHODS[recipe.method]
    _check_count(recipe, method)
    sides = [_side(Path(model.path)) for model in recipe.models]
    family = _same_family(sides)
    first = sides[0]
    components = {name: _component(name, recipe, method, sides) for name in first.parts}
    result, dropped = _assembled(first, family, components)
    hashes = [hash_of(side.file) for side in sides]
    _check_hashes(recipe, hashes)
    known = replace(recipe, models=tuple(replace(model, sha256=digest) for model, digest in zip(recipe.models, hashes)))
    result = derive.cast(result, recipe.dtype)
    result = save.with_metadata(result, {**describe(first.found), **_ancestry(known, sides)})

    def check(path: Path) -> None:
        written = open_model(path)
        if written.tensors != dict(result.tensors):
            raise ModelError(f"{target}: what was written does not hold what was merged")

    digest = save.write_file(result, target, form, progress("merging", result.nbytes, on_work), check)
    if recipe_file is not None:
        known.write(recipe_file)
    return Merged(len(result), result.nbytes, digest, dropped, tuple(_notes(sides)))


# ---- the models


@dataclass(frozen=True)
class _Side:
    """One of the models: its components in the networks' own names."""

    file: ModelFile
    found: Found
    parts: Mapping[str, ModelFile]


def _side(path: Path) -> _Side:
    file, found = layout.opened(path)
    if not found.components:
        raise ModelError(
            f"{printable(str(path))} is {found.kind.value}, not a model or a part of one: LoRAs, embeddings and the "
            "like have commands of their own"
        )
    parts = {name: derive.arrange(file, part.origins) for name, part in found.components.items()}
    return _Side(file, found, parts)


def _check_count(recipe: Recipe, method: Method) -> None:
    fewest, most = method.inputs
    if not fewest <= len(recipe.models) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        order = ", the first of them the base that the others were tuned from" if method.base else ""
        raise RequestError("models", f"{recipe.method} merges {wanted} models{order}; {len(recipe.models)} were given")


def _same_family(sides: Sequence[_Side]) -> Family | None:
    first = sides[0].found.family.value
    for side in sides[1:]:
        other = side.found.family.value
        if other is not first:
            raise ModelError(
                f"{side.file.path} is {other.title if other else 'of no known family'}, and {sides[0].file.path} is "
                f"{first.title if first else 'of no known family'}: models of two families cannot be merged"
            )
    return first


def _notes(sides: Sequence[_Side]) -> list[str]:
    """What the models differ in that a merge does not mend."""
    notes = list[str]()
    predictions = {side.found.prediction.value for side in sides if side.found.prediction is not None}
    if len(predictions) > 1:
        notes.append(f"the models predict different things ({', '.join(sorted(predictions))}); the result is doubtful")
    for side in sides:
        if side.found.ema_names:
            notes.append(f"{side.file.path.name}: its averages (EMA) were left out; they mean nothing after a merge")
    return notes


# ---- the merge


def _component(name: str, recipe: Recipe, method: Method, sides: Sequence[_Side]) -> ModelFile:
    """One component of the result, in the network's names: merged, or one side's own."""
    mode = recipe.vae if name == "vae" else recipe.text if name.startswith("text_encoder") else "merge"
    if mode != "merge":
        chosen = sides[_letter(mode, name, len(sides))]
        if name not in chosen.parts:
            raise ModelError(f"{chosen.file.path} has no usable {name}: {chosen.found.missing.get(name, 'not there')}")
        return chosen.parts[name]
    absent = [side for side in sides if name not in side.parts]
    if absent:
        raise ModelError(
            f"{absent[0].file.path} has no usable {name} to merge "
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


def _letter(mode: str, name: str, count: int) -> int:
    number = ord(mode) - ord("a") if len(mode) == 1 else -1
    if not 0 <= number < count:
        sides = ", ".join(chr(ord("a") + index) for index in range(count))
        raise RequestError("vae" if name == "vae" else "text", f"{mode!r} is not known; use merge, {sides}")
    return number


def _check_shapes(component: str, parts: Sequence[ModelFile]) -> None:
    """ModelError unless all shapes are equal, or differ in the first convolution alone, where the first takes more."""
    first = parts[0]
    for other in parts[1:]:
        if missing := sorted(set(first) ^ set(other)):
            raise ModelError(
                f"{first.path} and {other.path} cannot be merged: {component} tensor {printable(missing[0])} is in "
                "one of them only"
            )
        for name, info in first.tensors.items():
            a, b = info.shape, other.tensors[name].shape
            if a == b:
                continue
            if name == _FIRST_CONVOLUTION and a[0] == b[0] and a[2:] == b[2:]:
                if a[1] > b[1]:
                    continue
                raise ModelError(
                    f"{other.path} takes {b[1]} channels and {first.path} takes {a[1]}: name the inpainting (or edit, "
                    "or depth) model first, so that the result is one"
                )
            raise ModelError(
                f"{first.path} and {other.path} cannot be merged: {component} tensor {printable(name)} is "
                f"{list(a)} in one and {list(b)} in the other"
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
    """One tensor of the result, in the dtype of the first model's."""
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
            # Channels that only the first model takes (a mask, a picture, a depth) stay as they are there.
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
                f"{printable(name)} comes out as NaN or infinite; look for damage with `gouache inspect --deep`"
            )
        return result.to(getattr(torch, TORCH_NAMES[info.dtype]))


# ---- the result


def _assembled(
    first: _Side, family: Family | None, components: Mapping[str, ModelFile]
) -> tuple[ModelFile, dict[str, int]]:
    """The components under the names that the first model has them, and what else stands in it but averages."""
    parts = [layout.as_in(first.found.components[name], part, family) for name, part in components.items()]
    taken = {
        source
        for part in first.found.components.values()
        for origin in part.origins.values()
        for source in origin.sources
    }
    averages = {name for name in first.file if name.startswith("model_ema.")}
    rest = [name for name in first.file if name not in taken and name not in averages]
    base = replace(derive.keep(first.file, rest), extra=save.plain_values(first.file.extra))
    result = derive.join(base, *parts)
    return result, {"averages (EMA), which mean nothing after a merge": len(averages)} if averages else {}


def _check_hashes(recipe: Recipe, hashes: Sequence[str]) -> None:
    for model, digest in zip(recipe.models, hashes):
        if model.sha256 and model.sha256 != digest:
            raise ModelError(
                f"{model.path} is not the file that the recipe was made with: its SHA-256 is {digest[:10]}..., the "
                f"recipe says {model.sha256[:10]}..."
            )


def _ancestry(recipe: Recipe, sides: Sequence[_Side]) -> dict[str, str]:
    """The recipe and the models' own ancestors, in the words that A1111 and ModelSpec use."""
    models: dict[str, Any] = {}
    for model, side in zip(recipe.models, sides):
        for key in ("sd_merge_models", "sd_merge_recipe"):
            try:
                earlier = json.loads(side.file.metadata.get(key, "null"))
            except ValueError:
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
