"""Where `gouache paint` saves its pictures: a named file, or the next free names in a folder.

What can be known before the first step is checked before it. Names are claimed exclusively, so that several programs
can write into one folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gouache.errors import FileError, RequestError, printable

if TYPE_CHECKING:
    from gouache.generate.picture import Picture

_NUMBERED = re.compile(r"(\d{5,})-.*\.png", re.IGNORECASE)


class Output:
    """`text` is the user's target: a .png file, or a folder, which has no suffix, exists or ends in a slash.

    None is `default`, a folder.
    """

    def __init__(self, text: str | None, default: Path, count: int, overwrite: bool) -> None:
        """Raises RequestError or FileError if `count` pictures cannot be saved there."""
        target = default if text is None else Path(text)
        if text == "-":
            raise RequestError("output", "- is not a file; pictures cannot be written to standard output")
        as_folder = text is None or text.endswith(("/", os.sep)) or target.is_dir()
        suffix = target.suffix.lower()
        if target.name.lower() == ".png":
            raise RequestError("output", f"{printable(str(target))} has no name before .png")
        if not as_folder and suffix not in ("", ".png"):
            raise RequestError(
                "output", f"{printable(str(target))} does not end in .png, the one format that holds the whole recipe"
            )
        self._as_file = not as_folder and suffix == ".png"
        self._target, self._count, self._overwrite = target, count, overwrite
        self.folder = target.parent if self._as_file else target
        _check_writable(self.folder)
        if self._as_file and not overwrite:
            for index in range(count):
                if os.path.lexists(path := self._file(index)):
                    raise RequestError("output", f"{printable(str(path))} exists; add --overwrite to replace it")

    def save(self, picture: Picture, index: int) -> Path:
        """Save the picture number `index`, from 0; returns its path. Raises FileError."""
        if self._as_file:
            try:
                return picture.save(self._file(index), overwrite=self._overwrite)
            except FileExistsError:  # taken since it was checked: the picture gets the next free number instead
                pass
        number = _next_number(self.folder)
        while True:
            try:
                return picture.save(self.folder / f"{number:05d}-{picture.seed}.png", overwrite=False)
            except FileExistsError:
                number += 1

    def _file(self, index: int) -> Path:
        if self._count == 1:
            return self._target
        return self._target.with_stem(f"{self._target.stem}-{index + 1:0{len(str(self._count))}d}")


def _next_number(folder: Path) -> int:
    """One more than the highest number of a picture in the folder."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return 0
    return max((int(match[1]) for match in map(_NUMBERED.fullmatch, names) if match), default=-1) + 1


def _check_writable(folder: Path) -> None:
    """Raises FileError if pictures cannot be saved in `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise FileError(existing, "is not a folder, so no pictures can be saved there")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FileError(existing, "cannot be written to: no permission; choose another folder with -o")
