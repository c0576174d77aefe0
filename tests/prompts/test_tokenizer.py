from __future__ import annotations

import hashlib
import html
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path

import ftfy
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.prompts.tokenizer import Tokenizer

PROMPTS = [
    "",
    "   ",
    "a red apple on a blue background",
    "masterpiece, best quality, 1girl, solo, long_hair, looking at viewer, (upper body:1.2), <lora:detail:0.8>",
    "An oil painting of Schloß Neuschwanstein, 8K UHD, f/1.8, ISO-200; by Caspar David Friedrich",
    "it's the cat's pyjamas, they'll say; I'd've gone, we're 'tis 'Twas o'clock",
    "score_9, score_8_up, score_7_up, source_anime, rating_safe, 1920x1080",
    "photo of naïve café façade, Ångström, ½ price, №5, ²³, Ⅻ",
    "東京タワーの夜景、雨、ネオン",
    "Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم नमस्ते สวัสดี שלום",
    "a 🐈‍⬛ and a 👩🏽‍🚀 on the 🌕!!! ¯\\_(ツ)_/¯ ❤️",
    "tabs\tand\nnew\r\nlines\u00a0and\u2003wide\u3000spaces\u200bzero",
    "e\u0301 \u1e9b\u0323 \ufb01 \uff21\uff22 \u212b \u0130 \u03a3\u03a3",
    "----- ... ,,,, ((((nested)))) [[[brackets]]] {a|b} __wild__ a|b|c",
    "don\u2019t \u201cquote\u201d &amp; &lt;b&gt;",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "<|startoftext|>between<|endoftext|> after",
    "\x00\x01\x7f\x85 control",
]

# Characters of Unicode 3.2, whose classes every version agrees on: the order of combining marks that are newer depends
# on the tables of `tokenizers`. Without separators that engines treat differently, lower case by character.
ORDINARY = st.text(
    st.characters(
        exclude_categories=("Cs", "Cn", "Cc", "Co"), max_codepoint=0x1FFFF, exclude_characters="\u0130"
    ).filter(lambda character: unicodedata.ucd_3_2_0.category(character) != "Cn")
).filter(lambda text: "oftext|>" not in text.lower())


@pytest.fixture(scope="module")
def reference(clip_folder: Path) -> Callable[[str], list[int]]:
    from transformers import CLIPTokenizerFast

    clip = CLIPTokenizerFast.from_pretrained(clip_folder)
    return lambda text: clip(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def plain(merges: list[str], byte_names: dict[int, str], vocabulary: dict[str, int]) -> Callable[[str], list[int]]:
    """Byte-pair encoding by its definition: merge the pair that was learnt first, until no known pair is left."""
    rank = {tuple(merge.split(" ")): number for number, merge in enumerate(merges)}
    word = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

    def pieces(text: str) -> list[str]:
        parts = [byte_names[byte] for byte in text.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            joined: list[str] = []
            while parts:
                take = 2 if tuple(parts[:2]) == best else 1
                joined.append("".join(parts[:take]))
                parts = parts[take:]
            parts = joined
        return parts

    def encode(text: str) -> list[int]:
        text = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
        return [vocabulary[piece] for found in word.findall(text) for piece in pieces(found)]

    return encode


def test_the_merges_are_openais_file_unchanged():
    data = resources.files("gouache.prompts").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()

    assert hashlib.sha256(data).hexdigest() == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_well_known_ids(tokenizer: Tokenizer):
    assert tokenizer.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (tokenizer.begin, tokenizer.end, len(tokenizer)) == (49406, 49407, 49408)


@pytest.mark.parametrize("text", PROMPTS)
def test_real_and_unusual_prompts_agree_with_transformers(text: str, tokenizer: Tokenizer, reference):
    assert tokenizer.encode(text) == reference(text)


@given(text=st.text())
@settings(deadline=None, max_examples=300)
def test_any_unicode_agrees_with_transformers(text: str, tokenizer: Tokenizer, reference):
    assert tokenizer.encode(text) == reference(text)


@given(text=ORDINARY)
@settings(deadline=None, max_examples=300)
def test_any_ordinary_unicode_agrees_with_the_definition(text: str, tokenizer: Tokenizer, plain):
    assert tokenizer.encode(text) == plain(text)


@pytest.mark.parametrize("text", PROMPTS[:9])
def test_ordinary_prompts_agree_with_openais_own_cleaning(text: str, tokenizer: Tokenizer, plain):
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    cleaned = " ".join(cleaned.split()).lower()

    assert tokenizer.encode(text) == plain(cleaned)


def test_special_tokens_in_the_text_are_recognised_in_upper_and_lower_case_as_openai_lower_cases_first(
    tokenizer: Tokenizer,
):
    assert tokenizer.encode("a <|endoftext|><|STARTOFTEXT|> b") == [320, 49407, 49406, 321]


@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.characters(categories=["Cs"]))))
@settings(deadline=None)
def test_words_contain_every_token_once(text: str, tokenizer: Tokenizer):
    words = tokenizer.words(text)

    assert [token for _, tokens in words for token in tokens] == tokenizer.encode(text)
    assert all(tokens for _, tokens in words)


@given(text=ORDINARY)
@settings(deadline=None)
def test_words_contain_every_letter_as_written(text: str, tokenizer: Tokenizer):
    text = unicodedata.normalize("NFC", text)

    assert "".join(word for word, _ in tokenizer.words(text)) == "".join(text.split())


def test_words_are_given_as_written(tokenizer: Tokenizer):
    words = tokenizer.words("A red-haired  NAÏVE girl's cat, 42")

    written = [word for word, _ in words]
    assert written == ["A", "red", "-", "haired", "NAÏVE", "girl", "'s", "cat", ",", "4", "2"]
    assert dict(words)["cat"] == (2368,)
    assert len(dict(words)["NAÏVE"]) > 1


def test_lone_surrogates_read_as_question_marks(tokenizer: Tokenizer):
    assert tokenizer.encode("a \udcff b") == tokenizer.encode("a ? b")


@given(words=st.lists(st.from_regex(r"[a-z]{1,12}|[0-9]|[.,!?]|[äéñöж猫]{1,4}", fullmatch=True)))
@settings(deadline=None)
def test_decoding_returns_the_words_with_single_spaces(words: list[str], tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("  ".join(words).upper())) == " ".join(words).strip()


def test_decoding_omits_begin_and_end(tokenizer: Tokenizer):
    ids = [tokenizer.begin, *tokenizer.encode("a cat, sitting"), tokenizer.end, tokenizer.end]

    assert tokenizer.decode(ids) == "a cat , sitting"


def test_the_vocabulary_can_be_looked_up_both_ways(tokenizer: Tokenizer, vocabulary: dict[str, int]):
    assert all(tokenizer.id(entry) == number for entry, number in vocabulary.items())
    assert all(tokenizer.token(number) == entry for entry, number in vocabulary.items())
    assert tokenizer.id("no such entry") is None
    assert tokenizer.token(49408) is None


def test_importing_loads_no_library_and_construction_is_quick():
    code = "import sys, gouache.prompts.tokenizer; print([m for m in ('tokenizers', 'torch') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    start = time.process_time()
    Tokenizer()
    seconds = time.process_time() - start

    assert loaded.strip() == "[]"
    assert seconds < 1  # 0.1 s on an idle machine, more on a busy one
