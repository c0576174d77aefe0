"""CLIP's tokenizer: text to byte-pair token ids (Radford et al. 2021), the same for every model family.

The merges are OpenAI's file, shipped next to this module under its own licence (LICENSE.OpenAI-CLIP). Text is
normalised as in the Transformers library: NFC, runs of whitespace as one space, lower case. OpenAI's own code also
runs ftfy and decodes HTML entities, so that a curly apostrophe becomes a straight one; Transformers, and therefore
the programs that people use, do not.
"""

from __future__ import annotations

import gzip
import json
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
BEGIN_ID, END_ID = 49406, 49407

_MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_MERGE_COUNT = 49152 - 256 - 2  # the file has 262,144 merges, CLIP was trained with the first ones

# A word is the ending of a contraction, letters, one digit, or a run of other characters except whitespace.
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text to token ids and back, without begin and end tokens.

    The vocabulary is built at first use, in about 0.1 s, once per process. `<|startoftext|>` and `<|endoftext|>` in a
    text become the ids 49406 and 49407, as in CLIP's own code.
    """

    begin = BEGIN_ID
    end = END_ID

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        return _build()

    def __len__(self) -> int:
        """The number of entries in the vocabulary: 49408."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, of any number. Lone surrogates are read as question marks."""
        return self._backend.encode(_valid(text), add_special_tokens=False).ids

    def words(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of `text` as written, in order, each with its token ids."""
        text = _valid(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans: dict[int, tuple[int, int]] = {}
        ids: dict[int, list[int]] = {}
        for word, (start, stop), token in zip(encoding.word_ids, encoding.offsets, encoding.ids):
            if word is None:
                continue
            first = spans.get(word, (start, stop))[0]
            spans[word] = (first, stop)
            ids.setdefault(word, []).append(token)
        return [(text[slice(*spans[word])], tuple(ids[word])) for word in ids]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, lower case, words separated by spaces; begin and end tokens are left out."""
        return self._backend.decode(ids, skip_special_tokens=True).replace("</w>", " ").strip()

    def token(self, id: int) -> str | None:
        """The vocabulary entry of an id, such as `cat</w>` (`</w>` ends a word); None for an id beyond the last."""
        return self._backend.id_to_token(id)

    def id(self, token: str) -> int | None:
        """The id of a vocabulary entry, such as 2368 for `cat</w>`; None if there is no such entry."""
        return self._backend.token_to_id(token)


def vocabulary_files() -> dict[str, bytes]:
    """The vocabulary in the files that Transformers reads: {"vocab.json": content, "merges.txt": content}."""
    merges, entries = _merges_and_entries()
    vocabulary = json.dumps({entry: id for id, entry in enumerate(entries)}, ensure_ascii=False)
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    return {"vocab.json": vocabulary.encode(), "merges.txt": f"#version: 0.2\n{lines}".encode()}


def _merges_and_entries() -> tuple[list[tuple[str, str]], list[str]]:
    with gzip.open(_MERGES, "rt", encoding="utf-8") as lines:
        merges = [(a, b) for a, b in (line.split() for line in islice(lines, 1, 1 + _MERGE_COUNT))]
    characters = _byte_characters()
    return merges, [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), BEGIN, END]


@cache
def _build() -> tokenizers.Tokenizer:
    # Imported here so that the rest of the package, and --help, do not wait for it.
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges, entries = _merges_and_entries()
    backend = Tokenizer(
        models.BPE(
            vocab={entry: id for id, entry in enumerate(entries)},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BEGIN, normalized=True), AddedToken(END, normalized=True)])
    return backend


def _byte_characters() -> list[str]:
    """A printable character for each byte, in vocabulary order: printable Latin-1 unchanged, then the other 68."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in plain] + [chr(256 + n) for n in range(256 - len(plain))]


def _valid(text: str) -> str:
    # Command lines in another encoding and JSON escapes can contain half a surrogate pair, which UTF-8 cannot encode.
    return text.encode("utf-8", "replace").decode("utf-8")
