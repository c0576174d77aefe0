"""Divides a data set into pictures to train on and pictures held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from gouache.data.contents import Content
from gouache.data.duplicates import groups
from gouache.data.record import Record
from gouache.errors import RequestError
from gouache.wording import plural

SETTING = "holdout"


def split(
    records: Sequence[Record], contents: Sequence[Content], holdout: float | int, seed: int
) -> tuple[list[Record], list[Record]]:
    """(to train on, held out). `holdout`: a share of the pictures below 1, or as an int from 1 their number.

    Copies of a picture are never on both sides. What is held out depends on what is in the pictures and on `seed`, not
    on names and order, and changes little when pictures are added. Regularization pictures are not counted, and neither
    they nor their copies are held out. `contents` are those of `records`. Raises RequestError if no picture can be held
    out.
    """
    count = sum(not record.regularization for record in records)
    wanted = _number(holdout, count)
    if not wanted:
        return list(records), []
    eligible = [group for group in groups(contents) if not any(records[row].regularization for row in group)]
    order = sorted(eligible, key=lambda group: _position(min(contents[row].sha256 for row in group), seed))
    held = set[int]()
    for group in order:
        if len(held) + len(group) <= wanted:
            held |= set(group)
    if not held and order:  # every group has more copies than wanted
        held |= set(min(order, key=len))
    if not 0 < len(held) < count:
        shown = plural(count, "picture")
        raise RequestError(SETTING, f"no picture can be held out: {shown}, all copies of one or of the class")
    return [each for row, each in enumerate(records) if row not in held], [records[row] for row in sorted(held)]


def split_by_digest(digests: Sequence[str], holdout: float | int, seed: int) -> tuple[list[int], list[int]]:
    """The same by hashes of the pictures, for large sets: (rows to train on, rows held out), both ascending.

    Only equal pictures are never on both sides, not those that look alike.
    """
    wanted = _number(holdout, len(digests))
    groups = dict[str, list[int]]()
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    held = set[int]()
    for digest in sorted(groups, key=lambda digest: _position(digest, seed)):
        if len(held) == wanted:
            break
        if len(held) + len(groups[digest]) <= wanted:
            held.update(groups[digest])
    if wanted and not held:
        raise RequestError(SETTING, f"no picture can be held out: {plural(len(digests), 'picture')}, all copies of one")
    return [row for row in range(len(digests)) if row not in held], sorted(held)


def _number(holdout: float | int, count: int) -> int:
    """How many of `count` pictures to hold out: none for 0, else at least one."""
    if not holdout >= 0 or (isinstance(holdout, float) and holdout >= 1):
        raise RequestError(SETTING, f"is {holdout}; expected a share below 1, or a whole number of pictures")
    if holdout >= max(1, count):
        found = f"{plural(count, 'picture')} that are not of the class"
        raise RequestError(SETTING, f"is {holdout}, and there are {found}; some must be left")
    if holdout == 0:
        return 0
    return int(holdout) if holdout >= 1 else min(max(1, round(holdout * count)), count - 1)


def _position(digest: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {digest}".encode()).digest()
