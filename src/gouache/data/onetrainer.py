"""Data sets described by OneTrainer's concepts.json: a list of concepts, each a folder of pictures with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gouache.data.dataset import DataSet
from gouache.data.listing import folders, read_caption
from gouache.data.record import Record
from gouache.data.subset import Subset, read_pictures, with_trigger
from gouache.errors import FileError, printable

Values = Mapping[str, Any]

# Options without a counterpart; a note names those that are on.
_WITHOUT_EFFECT = (
    "enable_fixed_flip", "enable_random_rotate", "enable_fixed_rotate", "enable_fixed_brightness",
    "enable_fixed_contrast", "enable_fixed_saturation", "enable_fixed_hue", "enable_random_circular_mask_shrink",
    "enable_random_mask_rotate_crop", "caps_randomize_enable",
)  # fmt: skip
_COLORS = tuple(f"enable_random_{name}" for name in ("brightness", "contrast", "saturation", "hue"))


def concepts_of(value: Any) -> Sequence[Values] | None:
    """The concepts in the parsed JSON of a file, also of OneTrainer's whole settings; None if there are none."""
    found = value.get("concepts") if isinstance(value, dict) else value
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        return None
    is_concept = [isinstance(each.get("text"), dict) or isinstance(each.get("image"), dict) for each in found]
    return found if all(is_concept) else None


def read(path: Path, concepts: Sequence[Values], defaults: Subset) -> DataSet:
    """The data set of the file `path`; `defaults` apply where it says nothing. Raises FileError."""
    records, notes = list[Record](), list[str]()
    for number, concept in enumerate(concepts, 1):
        name = printable(str(concept.get("name") or concept.get("path") or number), 80)
        kind = "VALIDATION" if concept.get("validation_concept") else str(concept.get("type", "STANDARD"))
        if not concept.get("enabled", True):
            continue
        if kind == "VALIDATION":
            notes.append(f"{name}: a concept for validation, which is not used; see validation.share")
            continue
        more, remarks = _read_concept(path, name, concept, kind == "PRIOR_PREDICTION", defaults)
        records += more
        notes += [f"{name}: {note}" for note in remarks]
    return DataSet(records, notes)


def _read_concept(
    path: Path, name: str, concept: Values, prior: bool, defaults: Subset
) -> tuple[list[Record], list[str]]:
    text, image = _table(path, name, concept, "text"), _table(path, name, concept, "image")
    repeats, notes = _repeats(path, name, concept)
    captions, pictures, subset = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    captions["shuffle"] = bool(text.get("enable_tag_shuffling"))
    captions["separator"] = str(text.get("tag_delimiter") or ",")
    captions["keep_tokens"] = int(_number(path, name, text, "keep_tags_count", 1))
    if text.get("tag_dropout_enable"):
        if text.get("tag_dropout_mode") == "RANDOM":
            captions["tag_dropout"] = min(1.0, _number(path, name, text, "tag_dropout_probability", 0))
        else:
            notes.append("only tag_dropout_mode RANDOM is available; no tags are dropped")
    pictures["flip"] = bool(image.get("enable_random_flip", True))
    pictures["random_crop"] = bool(image.get("enable_crop_jitter", True))
    pictures["color"] = any(image.get(each) for each in _COLORS)
    subset["repeats"] = repeats
    if image.get("enable_resolution_override"):
        sides = str(image.get("resolution_override", "")).split(",")
        if not sides[0].strip().isdecimal() or not int(sides[0]):
            raise FileError(path, f"{name}: resolution_override is {printable(sides[0], 40)!r}; expected pixels")
        subset["resolution"] = (int(sides[0]), int(sides[0]))
        notes += ["only the first resolution of resolution_override is used"] if len(sides) > 1 else []
    ignored = [each for each in _WITHOUT_EFFECT if text.get(each) or image.get(each)]
    notes += [f"{', '.join(ignored)}: without effect here"] if ignored else []
    notes += ["the target of these pictures is that of loss.prior; model is what OneTrainer does"] if prior else []
    weight = _number(path, name, concept, "loss_weight", 1)

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in defaults.fixed}

    chosen = replace(
        defaults,
        regularization=prior,
        **kept(subset),
        caption_options=replace(defaults.caption_options, **kept(captions)),
        picture_options=replace(defaults.picture_options, **kept(pictures)),
    )
    root = _folder(path, name, concept)
    listed = folders(root, levels=None if concept.get("include_subdirectories") else 0)
    records, remarks = read_pictures(listed, root.parent, chosen)
    records = [replace(each, weight=each.weight * weight) for each in records]
    source = text.get("prompt_source", "sample")
    if source == "filename":
        records = [replace(each, captions=(with_trigger(each.path.stem, _trigger(chosen)),)) for each in records]
    elif source == "concept":
        lines = read_caption(_existing(path, str(text.get("prompt_path", ""))))
        lines = tuple(with_trigger(line, _trigger(chosen)) for line in lines)
        records = [replace(each, captions=lines) for each in records]
    if source in ("filename", "concept"):
        remarks = [each for each in remarks if "caption" not in each]
    # One of several lines is drawn each time.
    several = [len(each.captions) > 1 for each in records]
    records = [
        replace(each, caption_options=replace(each.caption_options, wildcard=True)) if many else each
        for each, many in zip(records, several)
    ]
    return records, [*notes, *remarks]


def _repeats(path: Path, name: str, concept: Values) -> tuple[int, list[str]]:
    strategy = str(concept.get("balancing_strategy", "REPEATS"))
    balancing = _number(path, name, concept, "balancing", 1)
    if strategy == "SAMPLES":
        return 1, ["balancing by samples is not available; each picture is seen once per epoch"]
    repeats = max(1, round(balancing))
    if repeats == balancing:
        return repeats, []
    return repeats, [f"balancing {balancing:g} is not whole; each picture is seen {repeats} times per epoch"]


def _trigger(subset: Subset) -> str:
    return "" if subset.regularization else subset.trigger


def _folder(path: Path, name: str, concept: Values) -> Path:
    text = concept.get("path")
    if not isinstance(text, str) or not text or "\0" in text:
        raise FileError(path, f"{name}: has no path; expected the folder of its pictures")
    return _existing(path, text).absolute()


def _existing(file: Path, text: str) -> Path:
    """A path in the file, relative to the working directory, or, if it does not exist there, to the file's folder."""
    path, next_to_file = Path(text), file.parent / text
    try:
        return next_to_file if not path.exists() and next_to_file.exists() else path
    except (OSError, ValueError):
        raise FileError(file, f"names {printable(text, 60)!r}, which is not a possible file name") from None


def _table(path: Path, name: str, concept: Values, key: str) -> Values:
    found = concept.get(key, {})
    if not isinstance(found, dict):
        raise FileError(path, f"{name}: {key} is not a table of options")
    return found


def _number(path: Path, name: str, values: Values, key: str, usual: float) -> float:
    found = values.get(key, usual)
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 <= found < 2**31:
        raise FileError(path, f"{name}: {key} is {printable(repr(found), 40)}; expected a number from 0")
    return float(found)
