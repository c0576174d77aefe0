"""The library as painting sees it: LoRAs, embeddings, hypernetworks and VAEs by the names that prompts use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gouache.adapters.embedding import fits
from gouache.app import hashes, names
from gouache.app.search_paths import Candidate, candidates
from gouache.app.settings import Settings
from gouache.errors import FileError
from gouache.files.open import open_model
from gouache.generate.adapters import Kind, read_spec
from gouache.layouts.adapters import read_embedding


class LibraryShelf:
    """Names looked up in the folders of `settings`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, kind: Kind, name: str) -> Path:
        return names.resolve(name, self._settings, kind)

    def mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        """Embeddings whose file's name stands in `prompts` as a word of its own, in any case.

        Of several of one name, the first for text encoders of these widths; what is for others is passed over.
        """
        return {name: path for name, path, fit in self._named(prompts, widths) if fit}

    def passed_over(self, prompts: Sequence[str], widths: Mapping[str, int]) -> list[Path]:
        """Those that are mentioned, and are for other models."""
        every = list(self._named(prompts, widths))
        used = {name.casefold() for name, _, fit in every if fit}
        return [path for name, path, fit in every if not fit and name.casefold() not in used]

    def _named(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Iterator[tuple[str, Path, bool]]:
        text = " ".join(prompts).casefold()
        seen = set[str]()
        for path in self._embeddings:
            name = path.stem
            if not _stands_in(name.casefold(), text):
                continue
            fit = _fits(path, widths)
            if not fit or name.casefold() not in seen:
                seen |= {name.casefold()} if fit else set()
                yield name, path, fit

    def default_strength(self, path: Path) -> float:
        """What the user or the sidecar says, else 1."""
        from gouache.app.library import Library

        with Library.of(self._settings) as library:
            entry = library.entry(path)
        weight = entry.details.weight if entry is not None else None
        return 1.0 if weight is None else weight

    def sha256(self, path: Path) -> str:
        return hashes.sha256(open_model(path), self._settings)

    @cached_property
    def _embeddings(self) -> list[Path]:
        return [each.path for each in _of_kind(candidates(self._settings), "embedding")]


class RecordedShelf(LibraryShelf):
    """The files that a recipe names: where they were, else whatever has their hash, else their name."""

    def __init__(self, settings: Settings, splices: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(settings)
        self._splices = splices

    def find(self, kind: Kind, name: str) -> Path:
        for each in self._splices:
            if each.get("kind") == kind and each.get("setting") and read_spec(kind, str(each["setting"])).name == name:
                return self._again(each)
        return super().find(kind, name)

    def mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        used = [each for each in self._splices if each.get("kind") == "embedding" and not each.get("setting")]
        return {str(each.get("name", "")): self._again(each) for each in used}

    def default_strength(self, path: Path) -> float:
        """What it was then."""
        for each in self._splices:
            told = each.get("strength")
            if (
                each.get("name") == path.stem
                and isinstance(told, Mapping)
                and isinstance(told.get("unet"), int | float)
            ):
                return float(told["unet"])
        return super().default_strength(path)

    def by_hand(self) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
        """(file, strength, how) of each LoRA and hypernetwork that was attached before the picture was asked for."""
        for each in self._splices:
            if each.get("kind") in ("lora", "hypernetwork") and not each.get("setting"):
                told = each.get("strength")
                yield self._again(each), told if isinstance(told, Mapping) else {}, str(each.get("how", ""))

    def vae(self) -> Path | None:
        """The autoencoder from another file, if there was one."""
        return next((self._again(each) for each in self._splices if each.get("kind") == "vae"), None)

    def _again(self, used: Mapping[str, Any]) -> Path:
        path, digest = Path(str(used.get("path", ""))), str(used.get("sha256", ""))
        if path.exists():
            return path
        return names.resolve(f"{path.stem} [{digest}]" if digest else path.stem, self._settings, used["kind"])


def _of_kind(every: Iterable[Candidate], kind: str) -> Iterable[Candidate]:
    """Those in folders for that kind; elsewhere a file's header decides, if it is small."""
    for each in every:
        if each.category == kind or (not each.category and _is_small_embedding(each.path)):
            yield each


def _fits(path: Path, widths: Mapping[str, int]) -> bool:
    """Whether the header tells vectors of these widths. A file that cannot be read fits: using it will say why."""
    try:
        file = open_model(path)
    except FileError:
        return True
    read = read_embedding({name: info.shape for name, info in file.tensors.items()}, file.extra)
    return read is None or fits(read.widths, widths)


def _is_small_embedding(path: Path) -> bool:
    try:
        if path.is_dir() or path.stat().st_size > 4_000_000:
            return False
        file = open_model(path)
        return read_embedding({name: info.shape for name, info in file.tensors.items()}, file.extra) is not None
    except (FileError, OSError):
        return False


def _stands_in(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
