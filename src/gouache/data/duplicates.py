"""Pictures that are copies of each other: equal files, or files that look alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gouache.data.contents import Content

NEAR = 6  # bits of 64 in which the hashes of two copies differ at most; other pictures differ in about 32


def groups(contents: Sequence[Content], near: int = NEAR) -> list[list[int]]:
    """The rows of all pictures, those together that are copies of each other, also mirrored, or of a common copy.

    Groups do not depend on the order of the pictures. Each is sorted, and the groups by their first rows.
    """
    looks = np.array([each.look for each in contents], np.uint64)
    mirrored = np.array([each.mirrored for each in contents], np.uint64)
    found = list[list[int]]()
    left = np.arange(len(contents))
    while len(left):
        group, waiting = list[int](), [int(left[0])]
        left = left[1:]
        while waiting:
            row = waiting.pop()
            group.append(row)
            close = _distance(looks[left], mirrored[left], looks[row], mirrored[row]) <= near
            waiting += left[close].tolist()
            left = left[~close]
        found.append(sorted(group))
    return found


def _distance(looks: np.ndarray, mirrored: np.ndarray, look: np.uint64, mirror: np.uint64) -> np.ndarray:
    """In bits, of the more similar of the picture and its mirror image; symmetrical, although hashes are rounded."""
    directions = looks ^ look, looks ^ mirror, mirrored ^ look
    return np.minimum.reduce([np.bitwise_count(bits) for bits in directions])


def equal_files(contents: Sequence[Content]) -> list[list[int]]:
    """The rows of pictures with equal files, two or more in each group."""
    rows = dict[str, list[int]]()
    for row, each in enumerate(contents):
        rows.setdefault(each.sha256, []).append(row)
    return [group for group in rows.values() if len(group) > 1]
