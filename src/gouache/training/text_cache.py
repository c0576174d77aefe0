"""Encoded captions on disk. Every variant of a caption is an entry of its own, so shuffle and dropout still work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning, stack
from gouache.training import cache_file

FORMAT = "1"
PACK = 64  # entries of a file: not one file per caption, and not much memory
OPEN = 32  # files kept open


class TextCache:
    """What text encoders make of captions, kept in `folder`, `PACK` to a file; None: nothing is kept.

    `encoders` identifies the weights and everything else that matters: clip skip, emphasis, dtype; see
    `latent_cache.identity_of`. `encode` returns the conditioning of captions, one row each, without sizes. It receives
    one caption at a time, so that a result does not depend on which others are in the batch.

    At most `PACK` entries are in memory, those not yet written; `flush` writes them. A process that is killed before
    encodes them again.
    """

    def __init__(self, folder: Path | None, encoders: str, encode: Callable[[list[str]], Conditioning]) -> None:
        self.folder, self.encoders = folder, encoders
        self._encode = encode
        self._new: dict[str, Conditioning] = {}
        self._paths: dict[str, Path] = {}
        self._open = lru_cache(OPEN)(cache_file.open_entries)
        self.find()

    def __contains__(self, text: str) -> bool:
        key = self._key(text)
        return key in self._new or key in self._paths

    def read(self, text: str) -> Conditioning | None:
        """The row of `text`, None if it is missing or damaged. May be called by several threads."""
        key = self._key(text)
        if (row := self._new.get(key)) is not None:
            return row
        file = self._open(self._paths[key]) if key in self._paths else None
        entry = None if file is None else cache_file.read(file, key)
        return None if entry is None else Conditioning(entry["context"], entry.get("vector"))

    def row(self, text: str) -> Conditioning:
        """The row of `text`, encoded now if it is missing. Raises FileError if it cannot be stored."""
        row = self.read(text)
        if row is None:
            with torch.no_grad():
                row = self._encode([text]).to("cpu")
            if self.folder is not None:
                self._new[self._key(text)] = row
                if len(self._new) >= PACK:
                    self.flush()
        return row

    def join(self, rows: Sequence[Conditioning], chunks: int = 1) -> Conditioning:
        """One batch of `rows`; shorter ones get further chunks of the empty caption, as `prompts.encode` does it.

        It has as many chunks as the longest row, and at least `chunks`.
        """
        longest = max(row.tokens for row in rows)
        if chunks > 1 or any(row.tokens < longest for row in rows):
            empty = self.row("").context
            rows = [row.pad_to(max(chunks, longest // empty.shape[1]), empty) for row in rows]
        return stack(*rows)

    def find(self) -> None:
        """Look for files that other processes have written."""
        known = set(self._paths.values())
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            if path not in known:
                self._add(path)

    def flush(self) -> None:
        """Write what is only in memory. Raises FileError if that is impossible."""
        if not self._new or self.folder is None:
            return
        path = self.folder / f"{cache_file.key_of(*self._new)}.safetensors"
        cache_file.write(path, {key: _tensors(row) for key, row in self._new.items()})
        self._add(path)
        self._new.clear()

    def _add(self, path: Path) -> None:
        self._open.cache_clear()  # a damaged file was replaced
        file = self._open(path)
        if file is not None:
            self._paths |= dict.fromkeys(file.metadata, path)

    def _key(self, text: str) -> str:
        return cache_file.key_of(FORMAT, self.encoders, text)


def _tensors(row: Conditioning) -> dict[str, Tensor]:
    return {"context": row.context} if row.vector is None else {"context": row.context, "vector": row.vector}
