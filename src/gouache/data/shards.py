"""Data sets in tar shards, as webdataset has them: NAME.jpg, NAME.txt, NAME.json and NAME.mask.png are a sample.

    a folder with *.tar       one .tar       a pattern: laion-{000000..000123}.tar, {a,b}.tar

Nothing is unpacked: an index of each shard says where its pictures are, see `data.shard_index`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gouache.data.dataset import DataSet
from gouache.data.listing import some
from gouache.data.members import Member
from gouache.data.record import Record
from gouache.data.shard_index import Faults, ShardIndex, index
from gouache.data.shard_records import ShardRecords
from gouache.data.subset import Subset
from gouache.errors import FileError, printable
from gouache.wording import plural

SUFFIX = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LARGE = 20_000  # samples: above, a cache with a file per picture, and decoding all at the start, take too long
_MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

OnIndexed = Callable[[str, int, int], None]
"""(what, done, total) of a work in progress, in shards."""


def is_shards(path: Path) -> bool:
    """Whether `path` names shards: by its end, or by braces in the name of a file that does not exist."""
    return not path.is_dir() and path.name.lower().endswith((SUFFIX, *COMPRESSED))


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: numbers {008..010} keep their zeros, {a,b} are alternatives.

    Raises ValueError if there are too many.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is not None:
        inner = names.split(",")
    else:
        low, high, width = int(first), int(last), max(len(first), len(last))
        width = width if first.startswith("0") or last.startswith("0") else 0
        if abs(high - low) >= _MAX_SHARDS:
            raise ValueError
        inner = [str(number).zfill(width) for number in range(low, high + 1) or range(low, high - 1, -1)]
    tails = expand(pattern[match.end() :])
    if len(inner) * len(tails) > _MAX_SHARDS:
        raise ValueError
    return [pattern[: match.start()] + each + tail for each in inner for tail in tails]


def paths_of(path: Path) -> list[Path]:
    """The shards that `path`, a file or a pattern, names. Raises FileError if they are too many or compressed."""
    try:
        found = [path] if path.exists() else [Path(each) for each in expand(str(path))]
    except (ValueError, OSError):
        raise FileError(path, f"names more than {_MAX_SHARDS:,} shards, or is not a possible name") from None
    for each in found:
        if each.name.lower().endswith(COMPRESSED):
            raise FileError(each, "is compressed, and shards are read at any position; decompress it first: gunzip")
    return found


def read(
    paths: Sequence[Path],
    subset: Subset,
    *,
    caption_column: str = "",
    stream: bool = False,
    cache: Path | None = None,
    on_work: OnIndexed | None = None,
) -> DataSet:
    """The data set in the shards `paths`, with notes of what in them is not used.

    `stream`: the records are made when they are asked for, and identified by samples of their bytes. Otherwise they are
    a list, to be decoded before they are used as other pictures are. `cache` is the folder of the indexes. Raises
    FileError if a shard cannot be read or none has a picture.
    """
    shards = list[ShardIndex]()
    for path in paths:
        shards.append(index(path, subset.suffixes, caption_column, cache))
        if on_work is not None:
            on_work("indexing shards", len(shards), len(paths))
    notes = list(_notes(shards))
    if not any(map(len, shards)):
        where = Path(paths[0]) if len(paths) == 1 else paths[0].parent
        raise FileError(where, "; ".join(notes) or "has no pictures; expected NAME.jpg (or .png, .webp, ...) members")
    known = dict.fromkeys(column for shard in shards for column in shard.json_columns)
    if caption_column and caption_column not in known:
        raise FileError(
            paths[0], f"has no JSON with {printable(caption_column)!r}; it has {some(list(known), 20) or 'no columns'}"
        )
    records = ShardRecords(shards, subset)
    return DataSet(records if stream else [_plain(record) for record in records], notes)


def _plain(record: Record) -> Record:
    """A record that is identified by all of its bytes, as those of other files."""
    assert isinstance(record.path, Member)
    return replace(record, path=replace(record.path, digest=""))


def _notes(shards: Sequence[ShardIndex]) -> Iterator[str]:
    for shard in shards:
        faults: Faults = shard.faults
        name = printable(shard.path.name)
        if faults.damage:
            yield f"{name} {printable(faults.damage, 300)}: {plural(len(shard), 'sample')} before that used"
        if faults.bad:
            yield f"{name}: {plural(faults.bad, 'sample')} left out: {_shown(faults)}"
    if count := sum(shard.faults.unpictured for shard in shards):
        yield f"{plural(count, 'sample')} without a picture left out"
    if count := sum(shard.faults.irregular for shard in shards):
        yield f"{plural(count, 'member')} of shards left out: links, devices or named pipes, which are not followed"


def _shown(faults: Faults) -> str:
    rest = faults.bad - len(faults.shown)
    return "; ".join(printable(each, 200) for each in faults.shown) + (f" and {rest} more" if rest else "")
