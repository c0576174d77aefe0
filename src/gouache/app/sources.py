"""File sources for `generate`: finds LoRAs, embeddings, hypernetworks and VAEs in the library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from gouache.adapters.embedding import fits
from gouache.app import hashes, names
from gouache.app.search_paths import Candidate, candidates
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError
from gouache.files.open import open_model
from gouache.generate.adapters import Kind
from gouache.layouts.adapters import read_embedding
from gouache.prompts.embedding_names import used


class LibrarySource:
    """Finds files by name in the folders of `settings`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, kind: Kind, name: str, *, paths: bool = True) -> Path:
        try:
            return names.resolve(name, self._settings, kind, paths=paths)
        except RequestError as error:
            if paths or not re.search(r"[/\\~]", name):
                raise
            message = str(error).removeprefix(f"{error.setting}: ")
            raise RequestError(
                error.setting, f"{message}; tags in prompts name files of the library, not paths"
            ) from None

    def mentioned(self, texts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        """Name -> file of the embeddings whose file name occurs in `texts`, which are without escapes and weights.

        `widths`: the widths of the model's text encoders. Of several embeddings with one name, the first that fits
        them, those in a folder that the text names before others; those for other models are skipped.
        """
        return {name: path for name, path, fit in self._mentioned(texts, widths) if fit}

    def mentioned_for_other_models(self, texts: Sequence[str], widths: Mapping[str, int]) -> list[Path]:
        """The embeddings that are mentioned, but are for other models."""
        every = list(self._mentioned(texts, widths))
        used = {name.casefold() for name, _, fit in every if fit}
        return [path for name, path, fit in every if not fit and name.casefold() not in used]

    def _mentioned(self, texts: Sequence[str], widths: Mapping[str, int]) -> Iterator[tuple[str, Path, bool]]:
        """(name, file, whether it fits) of the embeddings that are mentioned."""
        every = "\n".join(texts).casefold()
        seen = set[str]()
        for path in sorted(
            self._embeddings, key=lambda path: f"{path.parent.name}/{path.stem}".casefold() not in every
        ):
            name = path.stem
            if not used(texts, [name]):
                continue
            fit = _fits(path, widths)
            if not fit or name.casefold() not in seen:
                seen |= {name.casefold()} if fit else set()
                yield name, path, fit

    def default_strength(self, path: Path) -> float:
        """The weight set by the user or a sidecar file, else 1."""
        from gouache.app.library import Library

        try:
            with Library.of(self._settings) as library:
                entry = library.entry(path)
        except FileError:  # a home folder that is read-only or full: painting does not need the library
            return 1.0
        weight = entry.details.weight if entry is not None else None
        return 1.0 if weight is None else weight

    def sha256(self, path: Path) -> str:
        return hashes.sha256(open_model(path), self._settings)

    @cached_property
    def _embeddings(self) -> list[Path]:
        return [each.path for each in _embeddings_of(candidates(self._settings))]


def _embeddings_of(every: Iterable[Candidate]) -> Iterable[Candidate]:
    """All files in folders for embeddings; in folders without a category, small files whose header shows one."""
    for each in every:
        if each.category == "embedding" or (not each.category and _is_small_embedding(each.path)):
            yield each


def _fits(path: Path, widths: Mapping[str, int]) -> bool:
    """Whether its vectors have the widths of these text encoders.

    True for a file that cannot be read, so that attaching it reports the reason.
    """
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
