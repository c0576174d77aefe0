"""A subset: pictures that share their settings, such as those of one folder, and how they become records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gouache.data.listing import CAPTIONS, CONDITION, MASK, Folder, read_caption, relative, some
from gouache.data.members import File
from gouache.data.record import CaptionOptions, PictureOptions, Record
from gouache.errors import printable
from gouache.wording import plural


@dataclass(frozen=True)
class Subset:
    """What the pictures of a subset have in common.

    `trigger` is put in front of each caption that does not contain it. A picture without a caption has that of
    `class_tokens`, else `trigger` and `class_word`. Regularization pictures get no trigger. Caption files have one of
    `suffixes`; the first that exists is used. `masks` has the masks of pictures by their stems; with `use_masks` False
    those beside pictures are not used. `fixed` are the names of fields, also of the options, that a data set which has
    settings of its own does not replace.
    """

    trigger: str = ""
    class_word: str = ""
    class_tokens: str = ""
    repeats: int = 1
    regularization: bool = False
    suffixes: Sequence[str] = CAPTIONS
    masks: Folder | None = None
    resolution: tuple[int, int] | None = None
    caption_options: CaptionOptions = field(default_factory=CaptionOptions)
    picture_options: PictureOptions = field(default_factory=PictureOptions)
    use_masks: bool = True
    fixed: frozenset[str] = frozenset()

    def record(
        self,
        path: File,
        name: str,
        captions: tuple[str, ...] | None,
        mask: File | None = None,
        conditioning: Path | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> Record:
        """The record of a picture; `captions` None: it has none."""
        return Record(
            path,
            name,
            self._captions(captions),
            self.repeats,
            regularization=self.regularization,
            mask=(mask if self.use_masks else None) or (self.masks.picture(path.stem) if self.masks else None),
            conditioning=conditioning,
            scores=scores or {},
            caption_options=self.caption_options,
            picture_options=self.picture_options,
            resolution=self.resolution,
        )

    def _captions(self, lines: tuple[str, ...] | None) -> tuple[str, ...]:
        trigger = "" if self.regularization else self.trigger
        if lines is None and not self.class_tokens:
            return (" ".join(filter(None, (trigger, self.class_word))),)
        return tuple(with_trigger(line, trigger) for line in lines or (self.class_tokens,))


def with_trigger(text: str, trigger: str) -> str:
    """`text`, after `trigger` and a comma unless it contains it as a word of its own."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{trigger}, {text}" if text else trigger


def read_pictures(listed: Sequence[Folder], root: Path, subset: Subset) -> tuple[list[Record], list[str]]:
    """The records of all pictures in folders, with the captions next to them, and notes. Names are relative to `root`.

    Raises FileError for a caption that is not text.
    """
    records, differing, without, unread = list[Record](), list[str](), list[str](), list[str]()
    unused = list[str]()
    for folder in listed:
        unread += [relative(path, root) for path in folder.unread_pictures()]
        for path in folder.pictures():
            name = relative(path, root)
            found = [read_caption(each) for each in folder.captions(path, subset.suffixes)]
            if len(set(found)) > 1:
                differing.append(name)
            if not found:
                without.append(name)
            mask, conditioning = folder.picture(path.stem, MASK), folder.picture(path.stem, CONDITION)
            if mask is not None and not subset.use_masks:
                unused.append(name)
            records.append(subset.record(path, name, found[0] if found else None, mask, conditioning))
    notes = list[str]()
    if unused:
        several = plural(
            len(unused), "picture has a mask beside it that is", "pictures have masks beside them that are"
        )
        notes.append(f"{several} not used; with data.masks = file they are: {some(unused)}")
    if unread:
        notes.append(f"{plural(len(unread), 'picture')} left out, in formats that are not read: {some(unread)}")
    if differing:
        used, ignored = subset.suffixes[:2]
        several = plural(len(differing), "picture has", "pictures have")
        notes.append(f"{several} different captions in {used} and {ignored}; {used} is used: {some(differing)}")
    if without and len(without) < len(records):
        count = f"{len(without)} of {plural(len(records), 'picture')}"
        notes.append(f"{count} without a caption file: {some(without)}")
    elif without:
        text = printable(records[0].captions[0])
        notes.append(f'no caption files; each caption is "{text}"' if text else "no caption files; captions are empty")
    return records, notes
