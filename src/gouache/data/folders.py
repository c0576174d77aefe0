"""Reads a data set from a folder or file, in any of the layouts that trainers use; see `read`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gouache.data import kohya_toml, metadata, onetrainer, shards
from gouache.data.dataset import DataSet
from gouache.data.listing import Folder, all_pictures, folders, is_picture, relative, some
from gouache.data.record import Record
from gouache.data.shards import OnIndexed
from gouache.data.subset import Subset, read_pictures
from gouache.errors import FileError, printable
from gouache.wording import plural

_REPEATS = re.compile(r"(\d{1,6})_(.+)")  # kohya's "10_sks dog"
_DEFAULTS = Subset()
_NO_PICTURES = "has no pictures; expected .png, .jpg, .webp, .bmp, .tiff or .avif files"
_OTHER_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


def read(
    path: Path,
    subset: Subset = _DEFAULTS,
    *,
    regularization: Path | None = None,
    caption_column: str = "",
    stream: bool = False,
    cache: Path | None = None,
    on_work: OnIndexed | None = None,
) -> DataSet:
    """The data set at `path`, which is one of:

    - a folder of pictures, searched with its sub-folders; captions in .txt or .caption files next to them, or none
    - a folder with kohya's sub-folders `10_sks dog`: repeats and caption; or one that has them in `img` and `reg`
    - a folder with `metadata.jsonl` or `metadata.csv`, as Hugging Face's imagefolder, or such a file
    - a .json or .jsonl file of kohya's scripts, in the folder of the pictures
    - a .toml file of kohya's scripts, with [[datasets]]
    - OneTrainer's concepts.json
    - webdataset's tar shards: a folder of them, one, or a pattern, see `data.shards`

    `subset` has the trigger and class word, and the options of all pictures that a TOML file does not set.
    `regularization` is another such folder, of pictures of the class. `caption_column`: where metadata has the
    captions, if its name does not tell. `stream`, `cache` and `on_work` are for shards, see `shards.read`. Raises
    FileError.
    """
    suffix = path.suffix.lower()
    if suffix == ".toml":
        found = kohya_toml.read(path, subset)
    elif suffix == ".json" and (concepts := onetrainer.concepts_of(metadata.parsed(path))) is not None:
        found = onetrainer.read(path, concepts, subset)
    elif suffix in metadata.SUFFIXES and not path.is_dir():
        listed = folders(path.parent)
        found = _described(listed, [(listed[0], path.name)], path.parent, subset, caption_column)
    else:
        listed = [] if shards.is_shards(path) else folders(path)
        if tars := _shards_in(listed) if listed else shards.paths_of(path):
            found = shards.read(
                tars, subset, caption_column=caption_column, stream=stream, cache=cache, on_work=on_work
            )
        else:
            found = _read_folder(path, listed, subset, caption_column)
    if regularization is not None:
        more = _read_folder(
            regularization, folders(regularization), replace(subset, regularization=True), caption_column
        )
        found = replace(found, records=[*found.records, *more.records], notes=[*found.notes, *more.notes])
    if not found.records:
        raise FileError(path, _NO_PICTURES)
    return found


def _shards_in(listed: Sequence[Folder]) -> list[Path]:
    """The shards in folders; none if there are pictures or metadata outside of them."""
    names = [(folder.path, name) for folder in listed for name in folder.names]
    if any(is_picture(name) or name in metadata.NAMES for _, name in names):
        return []
    found = [path / name for path, name in names if name.lower().endswith((shards.SUFFIX, *shards.COMPRESSED))]
    return [each for path in found for each in shards.paths_of(path)]


def _read_folder(root: Path, listed: list[Folder], subset: Subset, caption_column: str) -> DataSet:
    listed, notes = _without_other_splits(root, listed)
    files = [(folder, name) for folder in listed for name in metadata.NAMES if name in folder.names]
    if files:
        found = _described(listed, files, root, subset, caption_column)
    elif _numbered(listed, root):
        found = _read_kohya(listed, root, {root: subset})
    elif _numbered(listed, root / "img"):
        found = _read_kohya(listed, root, {root / "img": subset, root / "reg": replace(subset, regularization=True)})
    else:
        found = DataSet(*read_pictures(listed, root, subset))
        if _REPEATS.fullmatch(root.absolute().name):
            notes.append("the number in the folder's name is ignored; give its parent folder to use it as repeats")
    if not found.records:
        raise FileError(root, _NO_PICTURES)
    return replace(found, notes=[*notes, *found.notes])


def _without_other_splits(root: Path, listed: list[Folder]) -> tuple[list[Folder], list[str]]:
    """Without the validation and test folders next to a folder `train`: they are not to be trained on."""
    tops = {each.path.relative_to(root).parts[0] for each in listed[1:]}
    others = sorted(name for name in tops if name.lower() in _OTHER_SPLITS)
    if "train" not in tops or not others or listed[0].pictures():
        return listed, []
    used = [each for each in listed if not any(each.path.is_relative_to(root / name) for name in others)]
    return used, [f"only the folder train is used, not {', '.join(others)}"]


def _described(
    listed: Sequence[Folder], files: Sequence[tuple[Folder, str]], root: Path, subset: Subset, caption_column: str
) -> DataSet:
    """The pictures that metadata files, each given as (folder, name), describe; of their folder and those below it."""
    records, notes = list[Record](), list[str]()
    for folder, name in files:
        inside = [each for each in listed if each.path.is_relative_to(folder.path)]
        more, remarks = metadata.read(folder.path / name, inside, root, subset, caption_column)
        records += more
        notes += remarks
    used = {path for record in records for path in (record.path, record.mask, record.conditioning)}
    if left := [relative(path, root) for path in all_pictures(listed) if path not in used]:
        notes.append(f"{plural(len(left), 'picture')} left out, not in {printable(files[0][1])}: {some(left)}")
    return DataSet(records, notes)


def _numbered(listed: Sequence[Folder], parent: Path) -> list[tuple[Folder, int, str]]:
    """(folder, repeats, class tokens) of kohya's folders with pictures directly in `parent`."""
    found = list[tuple[Folder, int, str]]()
    for folder in listed:
        match = _REPEATS.fullmatch(folder.path.name)
        if folder.path.parent == parent and match and folder.pictures():
            found.append((folder, int(match[1]), match[2].strip()))
    return found


def _read_kohya(listed: Sequence[Folder], root: Path, parents: Mapping[Path, Subset]) -> DataSet:
    """The pictures of kohya's folders in `parents`. As in kohya's scripts, others are not used; a note names them."""
    records, notes, read = list[Record](), list[str](), set[Path]()
    for parent, subset in parents.items():
        for folder, repeats, tokens in _numbered(listed, parent):
            name = relative(folder.path, root)
            read.add(folder.path)
            if repeats < 1:
                notes.append(f"{printable(name)}: not used, because of 0 repeats")
                continue
            of_folder = replace(subset, class_tokens=tokens)
            if "repeats" not in subset.fixed:
                of_folder = replace(of_folder, repeats=repeats)
            more, remarks = read_pictures([folder], root, of_folder)
            records += more
            seen = f"{plural(len(more), 'picture')}, each seen {plural(of_folder.repeats, 'time')} per epoch"
            notes += [f"{printable(name)}: {each}" for each in (seen, *remarks)]
    others = [folder for folder in listed if folder.path not in read]
    if left := [relative(path, root) for path in all_pictures(others)]:
        count = plural(len(left), "picture")
        notes.append(f"{count} left out, not directly in a folder named like '10_sks dog': {some(left)}")
    return DataSet(records, notes)
