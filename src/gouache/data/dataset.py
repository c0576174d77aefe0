"""A data set: its pictures, and what its owner should know about how they were found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gouache.data.contents import OnWork, hashes
from gouache.data.record import Record
from gouache.data.shard_records import ShardRecords


@dataclass(frozen=True)
class DataSet:
    """`notes`: what was ignored, replaced or guessed, one line each.

    `settings` are those of a kohya TOML file that concern the run and not single pictures, by kohya's names:
    `resolution`, `batch_size`, `validation_split`, and those of buckets.
    """

    records: Sequence[Record]
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, cache: Path | None = None, on_work: OnWork | None = None) -> str:
        """A SHA-256 (hexadecimal) of all pictures with their captions, for the lineage of what is trained on them.

        It does not depend on names and order, but for a stream of shards, of which no picture is read for it. `cache`
        is that of `contents`. Raises RequestError if a picture cannot be read.
        """
        if isinstance(self.records, ShardRecords):
            return self.records.identity
        digests = hashes([record.path for record in self.records], cache, on_work)
        entries = [
            json.dumps([digest, *record.captions, record.repeats, record.regularization])
            for digest, record in zip(digests, self.records)
        ]
        return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()
