"""CLIP's vocabulary, read without the package's code, in the form that Transformers loads."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path

import pytest

from gouache.prompts.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def merges() -> list[str]:
    data = resources.files("gouache.prompts").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    return gzip.decompress(data).decode().split("\n")[1 : 49152 - 256 - 2 + 1]


@pytest.fixture(scope="session")
def byte_names() -> dict[int, str]:
    """{byte: its character}, in vocabulary order: bytes with a visible Latin-1 character, then the rest from U+0100."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


@pytest.fixture(scope="session")
def vocabulary(merges: list[str], byte_names: dict[int, str]) -> dict[str, int]:
    entries = list(byte_names.values())
    entries += [name + "</w>" for name in entries]
    entries += [merge.replace(" ", "") for merge in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return {entry: number for number, entry in enumerate(entries)}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, merges: list[str], vocabulary: dict[str, int]) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    special = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    config = {  # as in openai/clip-vit-large-patch14, with the padding token written in full like the others
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": special | {"content": "<|startoftext|>"},
        "eos_token": special | {"content": "<|endoftext|>"},
        "unk_token": special | {"content": "<|endoftext|>"},
        "pad_token": special | {"content": "<|endoftext|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()
