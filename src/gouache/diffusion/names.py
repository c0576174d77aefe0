"""Names as users type them: comparison, and suggestions for unknown names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def normalize(name: str) -> str:
    """`name` without the usual variations: "DPM++ 2M", "dpmpp_2m" and "k_dpmpp_2m" all become "dpmpp 2m"."""
    words = re.split(r"[\s_-]+", name.strip().lower().replace("++", "pp"))
    return " ".join(words[1:] if words[0] == "k" and len(words) > 1 else words)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the most similar known names, or all if none is similar."""
    by_normalized = {normalize(each): each for each in known}
    similar = difflib.get_close_matches(normalize(name), by_normalized, n=3, cutoff=0.5)
    names = ", ".join(repr(by_normalized[each]) for each in similar or by_normalized)
    return f"did you mean {names}?" if similar else f"choose one of {names}"
