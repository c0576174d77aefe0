"""`compare`: its pictures equal those that each model paints alone, and its measures are right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gouache.app.compare import compare, read_prompts
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError
from gouache.face import load
from tests.cli.conftest import Command, gouache
from tests.pipelines import Narrow, altered

__all__ = ["gouache"]  # the fixture, for the command's own test
KNOBS = {"steps": 2, "size": "64x64"}


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A narrow SD1, and the same with another bias in the last layer of the VAE."""
    one = narrow("sd1").file
    other = tmp_path_factory.mktemp("other") / "brighter.safetensors"
    altered(one, other, lambda tensors: tensors["first_stage_model.decoder.conv_out.bias"].add_(0.1))
    return [str(one), str(other)]


@pytest.fixture(scope="module")
def own(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("compare")
    return replace(settings, cache=folder / "cache", data=folder / "data")


def test_pictures_equal_those_of_each_model_alone(models: list[str], own: Settings, tmp_path: Path):
    measures = compare(
        models, ["a cat", "a dog"], tmp_path / "out", partial(load, settings=own), count=2, seed=5, **KNOBS
    )

    alone = list(load(models[1], settings=own).paint("a dog", seed=5, count=2, **KNOBS))
    compared = [np.asarray(Image.open(tmp_path / f"out/2-brighter/{name}.png")) for name in ("00002-5", "00003-6")]
    assert all(np.array_equal(np.asarray(a.image), b) for a, b in zip(alone, compared))

    first = [np.asarray(Image.open(path), float) for path in sorted((tmp_path / "out").glob("1-*/*.png"))]
    second = [np.asarray(Image.open(path), float) for path in sorted((tmp_path / "out").glob("2-*/*.png"))]
    expected = np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(first, second)])
    assert measures[0].distance is None and measures[1].distance == pytest.approx(expected) and expected > 1
    assert all(each.load_seconds > 0 and each.picture_seconds > 0 and each.fit is None for each in measures)

    report = json.loads((tmp_path / "out/measures.json").read_text())
    assert report["prompts"] == ["a cat", "a dog"] and [each["model"] for each in report["models"]] == models
    sheet = Image.open(tmp_path / "out/sheet.png")
    assert sheet.width >= 3 * 192 and sheet.height >= 4 * 64


def test_clip_scores_are_computed(models: list[str], own: Settings, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=32
    )
    transformers.CLIPModel(config).eval().save_pretrained(tmp_path / "clip")

    measures = compare(
        models, ["a cat"], tmp_path / "out", partial(load, settings=own), encoder=tmp_path / "clip", **KNOBS
    )

    assert all(each.fit is not None and -100 <= each.fit <= 100 for each in measures)
    assert measures[0].likeness is None and measures[1].likeness is not None and measures[1].likeness < 100


def test_invalid_input_is_refused(models: list[str], own: Settings, tmp_path: Path):
    for names, out, setting in ((models[:1], tmp_path / "new", "models"), (models, tmp_path, "output")):
        with pytest.raises(RequestError) as caught:
            compare(names, ["a cat"], out, partial(load, settings=own), **KNOBS)
        assert caught.value.setting == setting
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    for name in ("empty.txt", "absent.txt"):
        with pytest.raises(FileError):
            read_prompts(tmp_path / name)


def test_prompts_are_read_one_per_line(tmp_path: Path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n# a comment\n  a dog  \n", encoding="utf-8")

    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]


def test_the_command_prints_json_and_refuses_bad_arguments(gouache: Command, models: list[str], tmp_path: Path):
    (tmp_path / "p.txt").write_text("a cat\n")

    done = gouache("compare", *models, "--prompts", "p.txt", "-o", "out", "--steps", "1", "--size", "64x64", "--json")
    again = gouache("compare", *models, "--prompts", "p.txt", "-o", "out")
    missing = gouache("compare", *models, "nothere", "--prompts", "p.txt", "-o", "other")

    report = json.loads(done.out)
    assert report["folder"] == "out" and len(report["models"]) == 2 and (tmp_path / "out/sheet.png").is_file()
    assert again.code == 2 and again.err == "error: output: out exists already; give another folder\n"
    assert missing.code == 2 and "nothere" in missing.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "text", ["x" * 20_001, "a cat\n" + "y" * 5_000_000, "\udcff", "cat\n" * 1001, "# only a remark"]
)
def test_a_file_that_is_not_prompts_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(FileError) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_prompts_are_read_from_regular_files_only(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless", "absent", "."):
        with pytest.raises(FileError, match="expected a text file with one prompt per line"):
            read_prompts(tmp_path / name)


def test_the_folder_is_claimed_before_a_model_is_loaded(tmp_path: Path):
    (tmp_path / "file").write_text("")

    def load(name: str) -> Any:
        raise AssertionError("loaded")

    for out in (tmp_path, tmp_path / "file", tmp_path / "file/below", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(RequestError) as caught:
            compare(["a", "b"], ["a cat"], out, load)
        assert caught.value.setting == "output" and "\n" not in str(caught.value)
