"""File sources for `generate`: finds LoRAs, embeddings, hypernetworks and VAEs in the library or by a recipe."""

from __future__ import annotations

import os
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


class LibrarySource:
    """Finds files by name in the folders of `settings`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, kind: Kind, name: str) -> Path:
        return names.resolve(name, self._settings, kind)

    def mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        """Name -> file of the embeddings whose file name occurs in `prompts` as a separate word, ignoring case.

        `widths`: the widths of the model's text encoders. Of several embeddings with one name, the first that fits
        them; those for other models are skipped.
        """
        return {name: path for name, path, fit in self._mentioned(prompts, widths) if fit}

    def mentioned_for_other_models(self, prompts: Sequence[str], widths: Mapping[str, int]) -> list[Path]:
        """The embeddings that are mentioned, but are for other models."""
        every = list(self._mentioned(prompts, widths))
        used = {name.casefold() for name, _, fit in every if fit}
        return [path for name, path, fit in every if not fit and name.casefold() not in used]

    def _mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Iterator[tuple[str, Path, bool]]:
        """(name, file, whether it fits) of the embeddings that are mentioned."""
        text = " ".join(prompts).casefold()
        seen = set[str]()
        for path in self._embeddings:
            name = path.stem
            if not _is_mentioned(name.casefold(), text):
                continue
            fit = _fits(path, widths)
            if not fit or name.casefold() not in seen:
                seen |= {name.casefold()} if fit else set()
                yield name, path, fit

    def default_strength(self, path: Path) -> float:
        """The weight set by the user or a sidecar file, else 1."""
        from gouache.app.library import Library

        with Library.of(self._settings) as library:
            entry = library.entry(path)
        weight = entry.details.weight if entry is not None else None
        return 1.0 if weight is None else weight

    def sha256(self, path: Path) -> str:
        return hashes.sha256(open_model(path), self._settings)

    @cached_property
    def _embeddings(self) -> list[Path]:
        return [each.path for each in _embeddings_of(candidates(self._settings))]


class RecordedSource(LibrarySource):
    """Finds the adapter files of a recipe: by their path, else by their hash, else by their name.

    `adapters` are the recipe's entries.
    """

    def __init__(self, settings: Settings, adapters: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(settings)
        self._adapters = adapters

    def find(self, kind: Kind, name: str) -> Path:
        for each in self._adapters:
            if each.get("kind") == kind and each.get("setting") and read_spec(kind, str(each["setting"])).name == name:
                return self._locate(each)
        return super().find(kind, name)

    def mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        used = [each for each in self._adapters if each.get("kind") == "embedding" and not each.get("setting")]
        return {str(each.get("name", "")): self._locate(each) for each in used}

    def default_strength(self, path: Path) -> float:
        """The recorded strength, because the default may have changed since."""
        for each in self._adapters:
            strength = each.get("strength")
            if (
                each.get("name") == path.stem
                and isinstance(strength, Mapping)
                and isinstance(strength.get("unet"), int | float)
            ):
                return float(strength["unet"])
        return super().default_strength(path)

    def attached_before(self) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
        """(file, strength, how) of the LoRAs and hypernetworks that were attached to the model, not by the request."""
        for each in self._adapters:
            if each.get("kind") in ("lora", "hypernetwork") and not each.get("setting"):
                strength = each.get("strength")
                yield self._locate(each), strength if isinstance(strength, Mapping) else {}, str(each.get("how", ""))

    def vae(self) -> Path | None:
        """The VAE from another file, if there was one."""
        return next((self._locate(each) for each in self._adapters if each.get("kind") == "vae"), None)

    def _locate(self, used: Mapping[str, Any]) -> Path:
        path, digest = Path(str(used.get("path", ""))), str(used.get("sha256", ""))
        if os.path.exists(path):  # noqa: PTH110  # False for what is no possible path
            return path
        return names.resolve(f"{path.stem} [{digest}]" if digest else path.stem, self._settings, used["kind"])


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


def _is_mentioned(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
