"""The pictures of a run: read from its data set, filtered, weighed, examined, divided. No model is loaded for that.

Settings given with `--set` come first, then those that a data set has itself (kohya's TOML, OneTrainer's concepts),
then those chosen for the run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gouache.app import hashes, names
from gouache.app.settings import Settings
from gouache.app.training import pretraining
from gouache.app.training.folder import RunFolder
from gouache.data import contents, folders, pictures, scores, split, templates
from gouache.data.buckets import Buckets, Size, crops
from gouache.data.dataset import DataSet
from gouache.data.epochs import Plan
from gouache.data.listing import CAPTIONS
from gouache.data.record import CaptionOptions, PictureOptions, Record
from gouache.data.shard_records import ShardRecords
from gouache.data.subset import Subset
from gouache.errors import FileError, RequestError, printable
from gouache.files.open import open_model
from gouache.training.latent_cache import LatentCache
from gouache.training.run_settings import RunSettings
from gouache.training.settings_tables import DataSettings
from gouache.wording import plural

OnNote = Callable[[str], None]

# Settings of [data] -> fields of CaptionOptions.
_CAPTIONS: Mapping[str, str] = {
    "shuffle": "shuffle",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "separator": "separator",
    "secondary_separator": "secondary_separator",
    "caption_dropout": "dropout",
    "caption_dropout_epochs": "dropout_every_epochs",
    "tag_dropout": "tag_dropout",
    "prefix": "prefix",
    "suffix": "suffix",
    "wildcard": "wildcard",
    "warmup_tags": "warmup_min",
    "warmup_steps": "warmup_steps",
}
# Settings of [data] -> fields of Subset that they fix, besides those of the same name.
_FIXES: Mapping[str, tuple[str, ...]] = {
    "caption_extension": ("suffixes",),
    "masks": ("masks", "alpha_mask"),
    "template": ("templates",),
}


@dataclass(frozen=True)
class Pictures:
    """The training pictures and those held out of training, with the data set they are from.

    `caption_dropout` is the share of captions to leave out where all pictures have the same; where a data set has
    several, 0: then it is in the options of the records.
    """

    dataset: DataSet
    training: Sequence[Record]
    held_out: Sequence[Record]
    caption_dropout: float = 0.0


def read_pictures(settings: RunSettings, folder: RunFolder, on_note: OnNote, user: Settings | None = None) -> Pictures:
    """The pictures of a run. All are decoded, so that a damaged one is found now; those of a stream are not, nor read.

    Raises GouacheError.

    Without `user` class pictures are read from a folder of the settings alone, not from the user's data.
    """
    data = settings.data
    if settings.mode == "slider":
        return Pictures(DataSet(()), (), ())
    if not data.folder:
        raise RequestError("data.folder", "is missing; name a folder of pictures")
    found = read_data(settings, user)
    _check_class(settings, found)
    for note in found.notes:
        on_note(note)
    records, dropout = _common_dropout(found.records)
    training, held_out = records, list[Record]()
    amount = settings.validation.pictures or settings.validation.share
    if isinstance(records, ShardRecords):
        on_note(
            f"{plural(len(records), 'picture')} are read from shards as they are needed (data.stream); one that cannot "
            "be decoded counts nothing" + ("; latents and texts are kept, a file per picture" if data.cache else "")
        )
        if amount:
            kept, held = split.split_by_digest(records.digests(), amount, settings.validation.seed)
            training, held_out = records.chosen(np.array(kept)), records.chosen(np.array(held))
    else:
        examine(records, cache_of(settings, folder))
    if amount and not held_out:
        known = [_readable(each) for each in contents.contents([record.path for record in records], folder.contents)]
        training, held_out = split.split(records, known, amount, settings.validation.seed)
    if amount:
        on_note(f"{len(held_out)} of {plural(len(records), 'picture')} held out for validation")
    if not any(not record.regularization for record in training):
        raise RequestError("data.folder", f"{printable(data.folder)}: no picture is left to train on")
    pretraining.check_pairs(settings, training)
    if settings.loss.prior == "model" and not any(record.regularization for record in training):
        training = [*training, *_of_the_class(training, data.class_word)]
        on_note(f'prior: for "{printable(data.class_word)}" the model keeps to what it predicts now')
    return Pictures(found, training, held_out, dropout)


def read_data(settings: RunSettings, user: Settings | None) -> DataSet:
    """The data set with the class pictures that are there, filtered and weighed; nothing is decoded.

    Raises GouacheError, also if the filter leaves no picture.
    """
    data, subset, of_class = settings.data, subset_of(settings.data), class_folder(settings, user)
    found = folders.read(
        Path(data.folder),
        subset,
        caption_column=data.caption_column,
        stream=data.stream,
        cache=index_cache(user),
    )
    if data.stream and not isinstance(found.records, ShardRecords):
        raise RequestError("data.stream", f"is true, and {printable(data.folder)} has no tar shards; set it to false")
    found = scores.select(found, data.filter) if data.filter else found
    found = scores.weigh(found, data.weigh) if data.weigh else found
    if of_class is None or not _has_files(of_class):
        if data.class_folder and not paints_class(settings):
            problem = "has no pictures" if Path(data.class_folder).exists() else "does not exist"
            raise FileError(
                Path(data.class_folder),
                f"{problem}; data.class_folder names a folder of pictures of the class, or set data.class_pictures and "
                "loss.prior = pictures to have them painted there",
            )
        return found
    plain = replace(subset.caption_options, templates=())
    subset = replace(subset, regularization=True, fixed=subset.fixed - {"repeats"}, caption_options=plain)
    more = folders.read(of_class, subset)
    return replace(found, records=[*found.records, *more.records], notes=[*found.notes, *more.notes])


def _check_class(settings: RunSettings, found: DataSet) -> None:
    """Raises RequestError if pictures of the class are missing and cannot be painted."""
    data = settings.data
    if paints_class(settings) and not data.class_word:
        raise RequestError("data.class_word", "is missing: it says what the class pictures show")
    if settings.loss.prior != "pictures" or data.class_pictures:
        return
    if not any(record.regularization for record in found.records):
        raise RequestError(
            "loss.prior",
            "is pictures, and there are no pictures of the class; set data.class_word and data.class_pictures (100 are "
            "usual) to have them painted, or data.class_folder, or loss.prior = model",
        )


def subset_of(data: DataSettings) -> Subset:
    """What the settings say of all pictures."""
    fixed = {name for key in data.fixed for name in (key, _CAPTIONS.get(key, key), *_FIXES.get(key, ()))}
    lines = templates.read(data.template)
    named = any(templates.NAME in line for line in lines)
    if named and not data.trigger:
        raise RequestError("data.trigger", f"is missing: the captions of data.template say it for {templates.NAME}")
    options = {name: getattr(data, key) for key, name in _CAPTIONS.items()}
    options["templates"] = tuple(line.replace(templates.NAME, data.trigger) for line in lines)
    return Subset(
        trigger="" if named else data.trigger,
        class_word=data.class_word,
        repeats=data.repeats,
        suffixes=(data.caption_extension,) if data.caption_extension else CAPTIONS,
        caption_options=CaptionOptions(**options),
        picture_options=PictureOptions(
            flip=data.flip, random_crop=data.random_crop, color=data.color, alpha_mask=data.masks == "alpha"
        ),
        use_masks=data.masks != "none",
        fixed=frozenset(fixed),
    )


# Settings of kohya's TOML -> those of a run, and how their values are changed.
_OF_TOML: Mapping[str, tuple[str, str, Callable[[Any], Any]]] = {
    "resolution": ("data", "resolution", lambda value: [_text(value)]),
    "batch_size": ("train", "batch", lambda value: value),
    "enable_bucket": ("data", "buckets", lambda value: value),
    "bucket_no_upscale": ("data", "upscale", lambda value: not value),
    "bucket_reso_steps": ("data", "bucket_step", lambda value: value),
    "min_bucket_reso": ("data", "bucket_min", lambda value: value),
    "max_bucket_reso": ("data", "bucket_max", lambda value: value),
    "validation_split": ("validation", "share", lambda value: value),
    "validation_seed": ("validation", "seed", lambda value: value),
}  # fmt: skip


def _text(size: int | Sequence[int]) -> int | str:
    return size if isinstance(size, int) else "x".join(map(str, size))


def settings_of(dataset: DataSet) -> dict[str, dict[str, Any]]:
    """The settings that a data set itself states of the run, by table and key."""
    found = dict[str, dict[str, Any]]()
    for key, value in dataset.settings.items():
        table, name, change = _OF_TOML[key]
        found.setdefault(table, {})[name] = change(value)
    return found


def paints_class(settings: RunSettings) -> bool:
    """Whether pictures of the class are painted when there are fewer than are set."""
    return settings.data.class_pictures > 0 and settings.loss.prior != "none"


def class_folder(settings: RunSettings, user: Settings | None) -> Path | None:
    """The folder of the class pictures: that of the settings, or one of the user's data for what decides their look.

    Raises GouacheError if the model is not found.
    """
    data, model = settings.data, settings.model
    if data.class_folder:
        return Path(data.class_folder)
    if user is None or not paints_class(settings):
        return None
    digest = model.sha256 or hashes.sha256(open_model(names.resolve(model.name, user)), user)
    size = _size(data.resolution[-1]) if data.resolution else None
    parts = (data.class_word, digest, model.family, model.prediction, model.vae, model.clip_skip, size)
    word = re.sub(r"\W+", "-", data.class_word.lower()).strip("-")[:40]
    return user.data / "class pictures" / f"{word or 'class'}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def buckets_of(settings: RunSettings, usual: Size) -> tuple[Buckets, ...]:
    """The sizes of training; `usual` is that of the model. Raises RequestError if they are impossible."""
    data = settings.data
    return tuple(
        Buckets(
            size, data.bucket_step, data.bucket_min or None, data.bucket_max or None, data.upscale, not data.buckets
        )
        for size in sides(data.resolution, usual)
    )


def sides(resolution: Sequence[int | str], usual: Size) -> list[Size]:
    """The resolutions of training as (width, height)."""
    return [_size(each) for each in resolution] or [usual]


def _size(value: int | str) -> Size:
    if isinstance(value, int):
        return value, value
    width, height = value.split("x")
    return int(width), int(height)


def steps_of(settings: RunSettings, epochs: int, user: Settings, usual: Size) -> int:
    """The steps of so many epochs, see `batches_of`."""
    return -(-batches_of(settings, epochs, user, usual) // settings.train.accumulate)


def batches_of(settings: RunSettings, epochs: int, user: Settings, usual: Size) -> int:
    """The batches of so many epochs. Headers of the pictures are read; class pictures may still be missing.

    Pictures that will be held out for validation are counted. Raises GouacheError.
    """
    records = read_data(settings, user).records
    sizes = contents.sizes([record.path for record in records])
    buckets = buckets_of(settings, usual)
    seen = [(crops(size, buckets, record.resolution), record) for record, size in zip(records, sizes)]
    rows = [(crop.size, record.repeats, record.regularization) for found, record in seen for crop in found]
    if paints_class(settings) and not any(record.regularization for record in records):
        rows += [(buckets[-1].resolution, 1, True)] * settings.data.class_pictures
    plan = Plan(
        [size for size, _, _ in rows],
        [count for _, count, _ in rows],
        settings.train.batch,
        torch.Generator().manual_seed,
        regularization=[kind for _, _, kind in rows],
    )
    return plan.total(epochs)


def cache_of(settings: RunSettings, folder: RunFolder) -> Path | None:
    """The folder of the cached latents and texts; None if nothing is cached."""
    data = settings.data
    return (Path(data.cache_folder) if data.cache_folder else folder.cache) if data.cache else None


def latents_of(cache: Path | None) -> Path | None:
    return None if cache is None else cache / "latents"


def examine(records: Sequence[Record], cache: Path | None) -> None:
    """Decode all pictures and masks that were not decoded before. Raises RequestError for the first damaged one."""

    def unused(_: Any) -> Any:
        raise AssertionError("nothing is encoded here")

    known_files = LatentCache(latents_of(cache), "", unused)
    known = known_files.contents()
    found = [_readable(each) for each in contents.in_threads(lambda record: pictures.examine(record, known), records)]
    known_files.keep_contents(found)


def mask_note(shares: Sequence[float], count: int) -> str:
    """The line that confirms the masks: the share of each masked picture that counts, of `count` pictures."""
    mean = sum(shares) / len(shares)
    return (
        f"{len(shares)} of {plural(count, 'picture')} masked: the loss is limited to {mean:.0%} of their area on "
        "average, and divided by it"
    )


def _common_dropout(records: Sequence[Record]) -> tuple[Sequence[Record], float]:
    """The records without a share of dropped captions that all have, and that share."""
    if isinstance(records, ShardRecords):
        options = records.subset.caption_options
        return records.with_captions(replace(options, dropout=0.0)), options.dropout
    shares = {record.caption_options.dropout for record in records}
    if len(shares) != 1:
        return list(records), 0.0
    (share,) = shares
    return [replace(each, caption_options=replace(each.caption_options, dropout=0.0)) for each in records], share


def _of_the_class(records: Sequence[Record], word: str) -> list[Record]:
    """The training pictures once more, with the class alone as caption: for them the model shall predict as before."""
    if not word:
        raise RequestError("data.class_word", "is missing: with loss.prior = model it says what shall stay as it is")
    plain = CaptionOptions()
    return [replace(each, captions=(word,), regularization=True, caption_options=plain) for each in records]


def _readable(content: Any) -> Any:
    if isinstance(content, RequestError):
        raise content
    return content


def index_cache(user: Settings | None) -> Path | None:
    """The folder of the indexes of tar shards, shared by all runs."""
    return None if user is None else user.cache / "shards"


def _has_files(path: Path) -> bool:
    """Whether the folder has files that are not hidden; True for one that cannot be read: reading it says why."""
    try:
        return path.is_dir() and not all(each.name.startswith(".") for each in path.iterdir())
    except OSError:
        return True
