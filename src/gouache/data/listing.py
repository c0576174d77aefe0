"""The files in the folders of a data set: pictures, captions next to them, masks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gouache.errors import FileError, printable
from gouache.outside import read_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
OTHER_PICTURES = (".gif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".tga", ".jfif", ".svg")  # not read
CAPTIONS = (".txt", ".caption")
# Ends of the names of what belongs to another picture, OneTrainer's first.
MASK = ("-masklabel", ".mask", "-mask", "_mask")
CONDITION = ("-condlabel",)
MAX_CAPTION = 1_000_000  # bytes
MAX_DEPTH = 32  # of folders in each other


@dataclass(frozen=True)
class Folder:
    """A folder and the names of the files in it, in order; hidden files are left out."""

    path: Path
    names: Sequence[str]

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {name.lower(): name for name in reversed(self.names)}

    @cached_property
    def _pictures(self) -> dict[str, str]:
        """Stem -> name."""
        return {Path(name).stem: name for name in reversed(self.names) if is_picture(name)}

    def pictures(self) -> list[Path]:
        """Those to train on: without the masks and conditions of others."""
        return [self.path / name for name in self.names if is_picture(name) and not self._belongs_to_another(name)]

    def unread_pictures(self) -> list[Path]:
        """Pictures in formats that are not read."""
        return [self.path / name for name in self.names if Path(name).suffix.lower() in OTHER_PICTURES]

    def picture(self, stem: str, ends: Sequence[str] = ("",)) -> Path | None:
        """The picture with this name and the first possible of `ends`, whatever its suffix."""
        names = (self._pictures.get(stem + end) for end in ends)
        return next((self.path / name for name in names if name is not None), None)

    def captions(self, picture: Path, suffixes: Sequence[str]) -> list[Path]:
        """The caption files of a picture, in the order of `suffixes`."""
        names = (self._by_name.get(f"{picture.stem}{suffix}".lower()) for suffix in suffixes)
        return [self.path / name for name in names if name is not None]

    def _belongs_to_another(self, name: str) -> bool:
        stem = Path(name).stem
        return any(stem.endswith(end) and stem.removesuffix(end) in self._pictures for end in MASK + CONDITION)


def is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURES


def folders(root: Path, levels: int | None = None) -> list[Folder]:
    """`root` and the folders below it, in the order of their names; hidden ones are left out.

    `levels`: how many levels below it, None for all. Each folder is listed once, also if links lead to it again. Raises
    FileError if one cannot be read.
    """
    found, seen = list[Folder](), set[Path]()
    waiting = [(root, 0)]
    while waiting:
        path, depth = waiting.pop()
        if (real := _real(path)) in seen:
            continue
        seen.add(real)
        if depth > MAX_DEPTH:
            raise FileError(path, f"is more than {MAX_DEPTH} folders deep in the data set; move it up or take it out")
        names, below = _inside(path)
        found.append(Folder(path, names))
        if levels is None or depth < levels:
            waiting += [(path / name, depth + 1) for name in reversed(below)]
    return found


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise FileError(path, "cannot be read: its links lead nowhere") from None
    except ValueError:  # a NUL in the name
        raise FileError(path, "is not a possible folder name") from None


def _inside(path: Path) -> tuple[list[str], list[str]]:
    """Names of files, names of folders."""
    try:
        with os.scandir(path) as entries:
            found = sorted((each.name, _leads_to_folder(each)) for each in entries if not each.name.startswith("."))
    except FileNotFoundError:
        raise FileError(path, "does not exist; expected a folder of pictures") from None
    except NotADirectoryError:
        raise FileError(path, "is a file; expected a folder of pictures") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    return [name for name, is_folder in found if not is_folder], [name for name, is_folder in found if is_folder]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_caption(path: Path) -> tuple[str, ...]:
    """The lines of a caption file that are not empty; one empty line if all are. Raises FileError."""
    return caption_lines(read_text(path, MAX_CAPTION), path)


def caption_lines(text: str, path: Path, where: str = "") -> tuple[str, ...]:
    """The same for a text that was read from `path`; `where` tells errors from which part of it."""
    if "\0" in text:
        raise FileError(path, f"{where}is not text: it contains NUL characters; a caption is text in UTF-8")
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line) or ("",)


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few of `names`, for a note."""
    shown = ", ".join(printable(name, 100) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def relative(path: Path, root: Path) -> str:
    """The name of `path` in messages."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def all_pictures(listed: Sequence[Folder]) -> Iterator[Path]:
    for folder in listed:
        yield from folder.pictures()
