"""Names as users type them: when two are the same, and which known ones a wrong one is near to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def plain(name: str) -> str:
    """`name` without what people vary: "DPM++ 2M", "dpmpp_2m" and "k_dpmpp_2m" are all "dpmpp 2m"."""
    words = re.split(r"[\s_-]+", name.strip().lower().replace("++", "pp"))
    return " ".join(words[1:] if words[0] == "k" and len(words) > 1 else words)


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, or all if none is near."""
    by_plain = {plain(each): each for each in known}
    near = difflib.get_close_matches(plain(name), by_plain, n=3, cutoff=0.5)
    names = ", ".join(repr(by_plain[each]) for each in near or by_plain)
    return f"did you mean {names}?" if near else f"choose one of {names}"
