"""The library as painting sees it: LoRAs, embeddings, hypernetworks and VAEs by the names that prompts use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gouache.app import hashes, names
from gouache.app.places import Candidate, candidates
from gouache.app.settings import Settings
from gouache.errors import FileError
from gouache.files.open import open_model
from gouache.generate.splices import Kind, read_told
from gouache.layouts.adapters import read_embedding


class LibraryShelf:
    """Names looked up in the folders of `settings`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def find(self, kind: Kind, name: str) -> Path:
        return names.resolve(name, self._settings, kind)

    def mentioned(self, prompts: Sequence[str]) -> Mapping[str, Path]:
        """Embeddings whose file's name stands in `prompts` as a word of its own, in any case."""
        text = " ".join(prompts).casefold()
        found: dict[str, Path] = {}
        for name, path in self._embeddings.items():
            if _stands_in(name.casefold(), text) and name not in found:
                found[name] = path
        return found

    def usual_strength(self, path: Path) -> float:
        """What the user or the sidecar says, else 1."""
        from gouache.app.library import Library

        with Library.of(self._settings) as library:
            entry = library.entry(path)
        weight = entry.said.weight if entry is not None else None
        return 1.0 if weight is None else weight

    def sha256(self, path: Path) -> str:
        return hashes.sha256(open_model(path), self._settings)

    @cached_property
    def _embeddings(self) -> dict[str, Path]:
        return {each.path.stem: each.path for each in _of_kind(candidates(self._settings), "embedding")}


class RecordedShelf(LibraryShelf):
    """The files that a recipe names: where they were, else whatever has their hash, else their name."""

    def __init__(self, settings: Settings, splices: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(settings)
        self._splices = splices

    def find(self, kind: Kind, name: str) -> Path:
        for each in self._splices:
            if each.get("kind") == kind and each.get("told") and read_told(kind, str(each["told"])).name == name:
                return self._again(each)
        return super().find(kind, name)

    def mentioned(self, prompts: Sequence[str]) -> Mapping[str, Path]:
        used = [each for each in self._splices if each.get("kind") == "embedding" and not each.get("told")]
        return {str(each.get("name", "")): self._again(each) for each in used}

    def vae(self) -> Path | None:
        """The autoencoder from another file, if there was one."""
        return next((self._again(each) for each in self._splices if each.get("kind") == "vae"), None)

    def _again(self, used: Mapping[str, Any]) -> Path:
        path, digest = Path(str(used.get("path", ""))), str(used.get("sha256", ""))
        if path.is_file():
            return path
        return names.resolve(f"{path.stem} [{digest}]" if digest else path.stem, self._settings, used["kind"])


def _of_kind(every: Iterable[Candidate], kind: str) -> Iterable[Candidate]:
    """Those in folders for that kind; elsewhere a file's header decides, if it is small."""
    for each in every:
        if each.kind == kind or (not each.kind and _is_small_embedding(each.path)):
            yield each


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
