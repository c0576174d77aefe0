"""Shared fixtures: an empty home folder, CLIP's vocabulary, narrow models in every form."""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# A worker's tests, and the processes that they start, share the cores with the other workers: two OpenMP threads on a
# busy core wait for each other at every operation, which is many times slower than one thread.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from tests.pipelines import Narrow, build, save

if TYPE_CHECKING:
    from gouache import Model
    from gouache.app.settings import Settings


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:diffusers")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Settings, caches and model folders in an empty folder: a test never reads or writes those of the user."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HOME"):
            patch.setenv(name, str(folder))
        for name in [name for name in os.environ if name.startswith(("GOUACHE_", "HF_"))]:
            patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GOUACHE_INDEX", "0")  # no process outlives its test
        yield folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vocabulary, read without Gouache's code, in the form that Transformers loads."""
    packed = resources.files("gouache.prompts").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    # In vocabulary order: bytes with a printable Latin-1 character, then the others as characters from U+0100.
    visible = [chr(byte) for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    letters = visible + [chr(0x100 + number) for number in range(256 - len(visible))]
    entries = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]

    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Callable[[str], Narrow]:
    """The narrow model of a family (one of `pipelines.build`'s), made when it is first requested."""
    from gouache.workshop.convert import convert

    @functools.cache
    def make(family: str) -> Narrow:
        parent = tmp_path_factory.mktemp(family)
        pipeline = build(family, clip_folder)
        folder, file = save(pipeline, parent / "folder"), parent / f"{family}.safetensors"
        convert(folder, file)
        return Narrow(pipeline, folder, file)

    return make


@pytest.fixture(scope="session")
def settings(home: Path) -> Settings:
    from gouache.app.settings import Settings

    return Settings(
        models=(), output=home / "outputs", device="cpu", dtype="fp32", cache=home / "gouache", data=home / "data"
    )


@pytest.fixture(scope="session")
def loaded(narrow: Callable[[str], Narrow], settings: Settings) -> Callable[[str], Model]:
    """The single file of a narrow model, loaded in float32 on the CPU. Tests must not change it."""
    import gouache

    return functools.cache(lambda family: gouache.load(narrow(family).file, settings=settings))


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    """The same for the tests of one module, which may attach adapters and detach them again."""
    import gouache

    return functools.cache(lambda family: gouache.load(narrow(family).file, device="cpu", dtype="fp32"))
