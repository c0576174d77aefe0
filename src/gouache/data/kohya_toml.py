"""Data sets described in a TOML file of kohya's scripts: [general], [[datasets]], [[datasets.subsets]].

A value in [general] is the default of all data sets, one in a data set that of its subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gouache.data import metadata
from gouache.data.dataset import DataSet
from gouache.data.listing import all_pictures, folders, relative, some
from gouache.data.record import Record
from gouache.data.subset import Subset, read_pictures
from gouache.errors import FileError, printable
from gouache.outside import MalformedText, parse_toml, read_text
from gouache.wording import plural

Values = Mapping[str, Any]


def _is_true_or_false(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and value <= 1


def _is_size(value: Any) -> bool:
    values: list[Any] = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(_is_count(each) and each > 0 for each in values)


def _is_anything(value: Any) -> bool:
    return True


Check = Callable[[Any], bool]

# Keys of captions -> field of CaptionOptions, what its value must be.
_CAPTIONS: dict[str, tuple[str, Check]] = {
    "shuffle_caption": ("shuffle", _is_true_or_false),
    "keep_tokens": ("keep_tokens", _is_count),
    "keep_tokens_separator": ("keep_tokens_separator", _is_text),
    "caption_separator": ("separator", _is_text),
    "secondary_separator": ("secondary_separator", _is_text),
    "caption_dropout_rate": ("dropout", _is_share),
    "caption_dropout_every_n_epochs": ("dropout_every_epochs", _is_count),
    "caption_tag_dropout_rate": ("tag_dropout", _is_share),
    "caption_prefix": ("prefix", _is_text),
    "caption_suffix": ("suffix", _is_text),
    "enable_wildcard": ("wildcard", _is_true_or_false),
    "token_warmup_min": ("warmup_min", _is_count),
    "token_warmup_step": ("warmup_steps", _is_number),
}
# Keys of pictures -> field of PictureOptions; all are true or false.
_PICTURES = {"flip_aug": "flip", "random_crop": "random_crop", "color_aug": "color", "alpha_mask": "alpha_mask"}
# Other keys that may be in every table.
_OF_SUBSET: dict[str, Check] = {
    "num_repeats": _is_count,
    "caption_extension": _is_text,
    "class_tokens": _is_text,
    "is_reg": _is_true_or_false,
}
# Fields of subsets and options that these keys set.
_FIELDS = {
    **{key: name for key, (name, _) in _CAPTIONS.items()},
    **_PICTURES,
    "num_repeats": "repeats",
    "caption_extension": "suffixes",
    "class_tokens": "class_tokens",
    "conditioning_data_dir": "masks",
    "resolution": "resolution",
}
# Keys that one subset alone may have.
_OF_ONE_SUBSET: dict[str, Check] = {
    "image_dir": _is_text,
    "metadata_file": _is_text,
    "conditioning_data_dir": _is_text,
    "validation_split": _is_share,  # of one subset: without effect
}
# Keys that concern the run: `DataSet.settings`.
_OF_RUN: dict[str, Check] = {
    "resolution": _is_size,
    "batch_size": _is_count,
    "enable_bucket": _is_true_or_false,
    "bucket_no_upscale": _is_true_or_false,
    "bucket_reso_steps": _is_count,
    "min_bucket_reso": _is_count,
    "max_bucket_reso": _is_count,
    "validation_split": _is_share,
    "validation_seed": _is_count,
}
# Keys without effect here; a note says so if they are set.
_WITHOUT_EFFECT = (
    "face_crop_aug_range", "resize_interpolation", "custom_attributes", "cache_info", "network_multiplier",
    "skip_image_resolution",
)  # fmt: skip

_SHARED: dict[str, Check] = {
    **{key: check for key, (_, check) in _CAPTIONS.items()},
    **dict.fromkeys(_PICTURES, _is_true_or_false),
    **_OF_SUBSET,
    **dict.fromkeys(_WITHOUT_EFFECT, _is_anything),
}


def read(path: Path, defaults: Subset) -> DataSet:
    """The data set of the TOML file `path`; `defaults` apply where it says nothing. Raises FileError.

    Folders are relative to the working directory, or, if they do not exist there, to the folder of the file.
    """
    try:
        values = parse_toml(read_text(path))
    except MalformedText as error:
        raise FileError(path, str(error)) from None
    general = _table(path, "[general]", values.pop("general", {}), _SHARED | _OF_RUN)
    tables = _tables(path, "[[datasets]]", values.pop("datasets", None))
    if values:
        raise FileError(path, f"has the unknown key {_key(values)}; expected [general] and [[datasets]]")
    datasets = list[Values]()
    records, notes, ignored = list[Record](), list[str](), dict[str, None]()
    for table in tables:
        subsets = _tables(path, "[[datasets.subsets]]", table.pop("subsets", None))
        dataset = {**general, **_table(path, "[[datasets]]", table, _SHARED | _OF_RUN)}
        datasets.append(dataset)
        for each in subsets:
            own = _table(path, "[[datasets.subsets]]", each, _SHARED | _OF_ONE_SUBSET)
            subset = {**dataset, **own}
            ignored |= dict.fromkeys(key for key in _WITHOUT_EFFECT if subset.get(key))
            ignored |= dict.fromkeys(f"{key} of a subset" for key in own if key in _OF_RUN)
            more, remarks = _read_subset(path, subset, defaults)
            records += more
            notes += remarks
    if ignored:
        notes.append(f"{printable(path.name)}: {', '.join(ignored)}: without effect here")
    settings, differing = _settings(datasets)
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        notes.append(
            f"{printable(path.name)}: {', '.join(differing)} {verb} between data sets; those of the run are used"
        )
    return DataSet(_unless_equal(records), notes, settings)


def _settings(datasets: list[Values]) -> tuple[dict[str, Any], list[str]]:
    """What all data sets agree on, and the keys on which they do not, except for `resolution`, which records have."""
    settings, differing = dict[str, Any](), list[str]()
    for key in _OF_RUN:
        values = [dataset.get(key) for dataset in datasets]
        if all(value == values[0] for value in values):
            settings |= {key: values[0]} if values[0] is not None else {}
        elif key != "resolution":
            differing.append(key)
    return settings, differing


def _unless_equal(records: list[Record]) -> list[Record]:
    """The records without their resolution if it is the same for all: then it is that of the run."""
    if len({record.resolution for record in records}) > 1:
        return records
    return [replace(record, resolution=None) for record in records]


def _read_subset(path: Path, values: Values, defaults: Subset) -> tuple[list[Record], list[str]]:
    root = _picture_folder(path, values)
    described = "metadata_file" in values
    listed = folders(root, levels=None if described else 1)
    values = {key: value for key, value in values.items() if _FIELDS.get(key) not in defaults.fixed}
    repeats = values.get("num_repeats", defaults.repeats)
    if repeats < 1:
        return [], [f"{printable(str(root))}: not used, because of num_repeats = 0"]
    masks = values.get("conditioning_data_dir")
    suffix = values.get("caption_extension")
    subset = replace(
        defaults,
        class_tokens=values.get("class_tokens", ""),
        repeats=repeats,
        regularization=values.get("is_reg", False),
        suffixes=(suffix,) if suffix else defaults.suffixes,
        masks=folders(_existing(path, masks), levels=0)[0] if masks else None,
        resolution=_size(values.get("resolution")),
        caption_options=_options(defaults.caption_options, values, {key: name for key, (name, _) in _CAPTIONS.items()}),
        picture_options=_options(defaults.picture_options, values, _PICTURES),
    )
    if described:
        records, notes = metadata.read(_existing(path, values["metadata_file"]), listed, root.parent, subset)
    else:  # as in kohya's scripts, without sub-folders, which may be subsets of their own
        records, notes = read_pictures(listed[:1], root.parent, subset)
        if deeper := [relative(each, root) for each in all_pictures(listed[1:])]:
            count = plural(len(deeper), "picture")
            notes.append(f"{count} in sub-folders left out; name the sub-folders as subsets: {some(deeper)}")
    if masks:
        with_mask = sum(record.mask is not None for record in records)
        notes.append(f"{printable(masks)}: masks of {with_mask} of {plural(len(records), 'picture')}")
    return records, [f"{printable(root.name)}: {note}" for note in notes]


def _picture_folder(path: Path, values: Values) -> Path:
    if "image_dir" in values:
        return _existing(path, values["image_dir"]).absolute()
    if "metadata_file" in values:
        return _existing(path, values["metadata_file"]).absolute().parent
    raise FileError(path, "has a [[datasets.subsets]] without image_dir, the folder of its pictures")


def _options(defaults: Any, values: Values, fields: Mapping[str, str]) -> Any:
    return replace(defaults, **{name: values[key] for key, name in fields.items() if key in values})


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _existing(toml: Path, text: str) -> Path:
    """A path of the file, relative to the working directory, or, if it does not exist there, to the file's folder."""
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    next_to_file = toml.parent / path
    try:
        return next_to_file if not path.exists() and next_to_file.exists() else path
    except OSError:  # too long for a file name
        raise FileError(toml, f"names {printable(text, 60)!r}, which is not a possible file name") from None


def _tables(path: Path, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise FileError(path, f"has no table {name}; it is not a data set file of kohya's scripts")
    return value


def _table(path: Path, name: str, values: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise FileError(path, f"{name} is not a table")
    for key, value in values.items():
        if key not in checks:
            raise FileError(path, f"{name} has the unknown key {_key([key])}; known are {', '.join(sorted(checks))}")
        if not checks[key](value):
            shown = (
                printable(repr(value), 60)
                if isinstance(value, str | int | float)
                else _KINDS.get(type(value), "a date")
            )
            raise FileError(path, f"{name} has {key} = {shown}; expected {_EXPECTED[checks[key]]}")
    return values


def _key(keys: Any) -> str:
    return repr(printable(next(iter(keys)), 60))


_KINDS = {dict: "a table", list: "a list"}
_EXPECTED: dict[Check, str] = {
    _is_true_or_false: "true or false",
    _is_text: "text",
    _is_number: "a number from 0",
    _is_count: "a whole number from 0",
    _is_share: "a number from 0 to 1",
    _is_size: "a number of pixels, or [width, height]",
}
