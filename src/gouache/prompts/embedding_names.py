"""Names of embeddings in prompts: the places where an embedding's vectors replace words.

As in A1111's web UI, a name is found where its tokens occur in the text that is encoded, in upper or lower case. That
text has no escapes, so the name `style (v2)` is written `style \\(v2\\)` in a prompt. Unlike there, punctuation after a
name does not hide it: CLIP reads `),` as one token. `embedding:name` and `embedding:folder/name.pt` are ComfyUI's ways
to write a name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

# As CLIP divides text into words before it looks for tokens.
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
_LETTER = r"[^\W\d_]"
_CONTRACTED = ("s", "t", "re", "ve", "m", "ll", "d")
_PREFIX = r"(?P<prefix>(?<!\w)embedding:\s*(?:[^\s,:/\\]+[/\\])*)?"
_SUFFIX = r"(?(prefix)(?:\.(?:safetensors|pt|bin)(?!\w))?)"


def split(text: str, names: Iterable[str]) -> list[tuple[str, str | None]]:
    """`text`, without escapes and weights, as (words, None) and (words, name of the embedding that replaces them).

    Where several names match, the longest does. Text around a name is returned in lower case.
    """
    every = tuple(names)
    pattern = _pattern(every)
    if pattern is None:
        return [(text, None)]
    folded = _folded(text)
    pieces: list[tuple[str, str | None]] = []
    end = 0
    for match in pattern.finditer(folded):
        pieces.append((folded[end : match.start()], None))
        pieces.append((match[0], every[int(str(match.lastgroup).removeprefix("name"))]))
        end = match.end()
    if not pieces:
        return [(text, None)]
    return [*pieces, (folded[end:], None)]


def used(texts: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that occur in `texts`, which are without escapes and weights."""
    texts = list(texts)
    folded = _folded("\n".join(texts))
    possible = [name for name in names if all(word in folded for word in _WORDS.findall(_folded(name)))]
    found = {name for text in texts for _, name in split(text, possible) if name is not None}
    return [name for name in possible if name in found]


def renamed(text: str, old: str, new: str) -> str:
    """`text` with `new` wherever it names the embedding `old`."""
    words = _WORDS.findall(_folded(old))
    text = unicodedata.normalize("NFC", text)
    return re.sub(_of_words(words), lambda _: new, text, flags=re.IGNORECASE) if words else text


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    words = {index: each for index, name in enumerate(names) if (each := _WORDS.findall(_folded(name)))}
    longest_first = sorted(words, key=lambda index: -len(words[index]))
    alternatives = "|".join(f"(?P<name{index}>{_of_words(words[index])})" for index in longest_first)
    return re.compile(f"{_PREFIX}(?:{alternatives}){_SUFFIX}") if alternatives else None


def _of_words(words: list[str]) -> str:
    """A pattern of these words with any spaces between them, and no more letters at the ends."""
    pattern = re.escape(words[0])
    for before, word in pairwise(words):
        both_letters = before[-1].isalpha() and word[0].isalpha()
        pattern += (r"\s+" if both_letters else r"\s*") + re.escape(word)
    if words[0][0].isalpha():
        pattern = (r"(?<!')" if words[0] in _CONTRACTED else "") + f"(?<!{_LETTER})" + pattern
    return pattern + (f"(?!{_LETTER})" if words[-1][-1].isalpha() else "")


def _folded(text: str) -> str:
    """As CLIP's tokenizer normalises text; file names of macOS are decomposed (NFD)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
