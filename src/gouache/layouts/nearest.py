"""The known name that is most similar to an unknown one, in bounded time, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LETTERS = 200  # of each name that are compared; the time grows with their product
_MOST_NAMES = 2000  # that are compared
_LEAST = 0.6  # similarity, from 0 to 1


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known` that is most similar to `name`; "" if none is.

    Of more than 2000 known names only those are compared that have the most dotted parts in common with `name`.
    """
    known = list(known)
    if len(known) > _MOST_NAMES:
        parts = set(_parts(name))
        known = sorted(known, key=lambda each: -len(parts.intersection(_parts(each))))[:_MOST_NAMES]
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(name[:_MOST_LETTERS])
    best, found = _LEAST, ""
    for each in known:
        matcher.set_seq1(each[:_MOST_LETTERS])
        if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best and (ratio := matcher.ratio()) > best:
            best, found = ratio, each
    return found


def _parts(name: str) -> list[str]:
    return name[:_MOST_LETTERS].replace("_", ".").split(".")
