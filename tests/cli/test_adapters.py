"""`gouache paint` with adapters: what is printed about them, what is refused, what the recipe contains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gouache as package
from tests.adapters.loras import factors, save_kohya
from tests.cli.conftest import Command
from tests.cli.test_paint import QUICK
from tests.pipelines import Narrow


@pytest.fixture
def file(narrow: Callable[[str], Narrow]) -> Path:
    return narrow("sd1").file


@pytest.fixture(scope="module")
def lora(narrow: Callable[[str], Narrow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = package.load(narrow("sd1").file, device="cpu", dtype="fp32")
    return save_kohya(tmp_path_factory.mktemp("loras") / "style.safetensors", model, factors(model))


@pytest.fixture
def hypernetwork(tmp_path: Path) -> Path:
    sides = tuple(
        {f"linear.{n}.{leaf}": torch.randn(shape) / 10 for n, (w, b) in enumerate((((128, 64), 128), ((64, 128), 64)))
         for leaf, shape in (("weight", w), ("bias", (b,)))} for _ in range(2)
    )  # fmt: skip
    torch.save({64: sides, "name": "some", "step": 1}, tmp_path / "some.pt")
    return tmp_path / "some.pt"


def test_the_adapters_used_are_printed_on_the_error_stream_and_in_the_json(
    gouache: Command, file: Path, lora: Path, hypernetwork: Path, tmp_path: Path
):
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "zorblax.safetensors")
    model = package.load(file, device="cpu", dtype="fp32")
    count = len(factors(model))

    ended = gouache(
        "paint", "a zorblax", "-m", file, "--json", "--lora", f"{lora}:0.8:te=0.5", "--lora-blocks", f"{lora}=OUTALL",
        "--hypernet", f"{hypernetwork}:0.5", "--embedding", tmp_path / "zorblax.safetensors", *QUICK,
    )  # fmt: skip

    assert ended.code == 0
    lines, recipe = ended.err.splitlines(), json.loads(ended.out)
    digests = [each["sha256"][:10] for each in recipe["adapters"]]
    assert (
        lines[0] == f"style [{digests[0]}]: lora, {count} modules, folded, strength 0.8 (text encoders 0.5), by block"
    )
    assert lines[1].startswith(f"some [{digests[1]}]: hypernetwork, ") and lines[1].endswith(" modules, strength 0.5")
    assert lines[2] == f"zorblax [{digests[2]}]: embedding, 2 vectors" and len(lines) == 3
    assert [each["kind"] for each in recipe["adapters"]] == ["lora", "hypernetwork", "embedding"]
    assert recipe["adapters"][0]["matched"] == count
    assert gouache("repaint", recipe["path"]).code == 0


def test_missing_trigger_words_are_reported(
    gouache: Command, file: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GOUACHE_MODELS", str(tmp_path))
    path = tmp_path / "fur.safetensors"
    save_file(load_file(lora), path, {"modelspec.trigger_phrase": "in fur style"})

    without = gouache("paint", "a cat <lora:fur:1>", "-m", file, *QUICK)
    with_words = gouache("paint", "a cat in fur style <lora:fur:1>", "-m", file, *QUICK)

    assert "note: fur was trained with the words in fur style; the prompt has none of them" in without.err
    assert "note" not in with_words.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--lora", "nowhere"), "error: lora: there is no file 'nowhere'"),
        (("--lora", "{lora}:1:2:3"), "error: lora: "),
        (("--lora", "{model}:1"), "error: "),
        (("--lora", "{lora}", "--lora-blocks", "{lora}=1,2,3"), "error: lora_blocks: 3 numbers were given"),
        (("--lora-blocks", "{lora}=ALL"), "error: lora_blocks: "),
        (("--hypernet", "{lora}:x"), "error: hypernetwork: there is no file"),
        (("--embedding", "nowhere"), "error: embedding: there is no file 'nowhere'"),
        (("--vae", "nowhere"), "error: vae: there is no file 'nowhere'"),
        (("--lora", "{wide}"), "error: {wide} changes none of the modules"),
    ],
)
def test_an_invalid_adapter_is_refused_in_one_line_and_nothing_is_painted(
    arguments: tuple[str, ...], line: str, gouache: Command, file: Path, lora: Path, tmp_path: Path
):
    wide = tmp_path / "wide.safetensors"
    tensors = load_file(lora)
    save_file({name: torch.cat([t, t], 1) if "lora_down" in name else t for name, t in tensors.items()}, wide)
    paths = {"lora": str(lora), "model": str(file), "wide": str(wide)}

    ended = gouache("paint", "a cat", "-m", file, "-o", "out/", *(each.format(**paths) for each in arguments), *QUICK)

    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith(line.format(**paths)) and ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_kind_of_a_file_that_is_not_an_adapter_is_reported(gouache: Command, file: Path):
    ended = gouache("paint", "a cat", "-m", file, "--lora", file, *QUICK)

    assert ended.code == 2 and "cannot be attached: it is checkpoint" in ended.err


def test_a_baked_lora_gives_the_picture_of_an_attached_one(gouache: Command, file: Path, lora: Path, tmp_path: Path):
    """Up to the rounding of the weights."""
    assert gouache("lora", "bake", file, f"{lora}:0.8", tmp_path / "baked.safetensors").code == 0
    gouache("paint", "a cat", "-m", tmp_path / "baked.safetensors", "-o", "baked.png", *QUICK)
    gouache("paint", "a cat", "-m", file, "--lora", f"{lora}:0.8", "-o", "attached.png", *QUICK)

    one, other = (np.asarray(Image.open(name), np.int16) for name in ("baked.png", "attached.png"))
    assert np.abs(one - other).max() <= 1
