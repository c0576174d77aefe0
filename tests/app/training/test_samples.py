"""Samples of a run: what they show, with which weights, and how the sheet grows over a run that is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gouache
from gouache.app.settings import Settings
from gouache.app.training.samples import default_prompt, most_common
from gouache.data.record import Record
from gouache.generate.picture import read_recipe
from gouache.prompts.grammar import parse
from gouache.training.run_settings import checked
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]


def test_a_sample_is_what_paint_makes_of_the_exported_weights(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model, output = narrow("sd1").file, tmp_path / "out.safetensors"
    chosen = settings_of(
        model, pictures, output, mode="finetune", adapter={"form": "none"}, samples={"every": 2, "steps": 2},
        train={"ema_decay": 0.9},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    recipe, sample = read_recipe(tmp_path / "run/samples/step-00000004-00.png")
    request = recipe["request"]
    assert (request["prompt"], request["seed"], request["size"]) == ("zorb, number 0, red", 1, "64x64")

    loaded = gouache.load(output, device="cpu", dtype="fp32", settings=settings)
    painted = next(loaded.paint("zorb, number 0, red", seed=1, steps=2, size=(64, 64))).image
    assert np.abs(levels(painted) - levels(sample)).max() <= 2  # the file may have half precision
    first = Image.open(tmp_path / "run/samples/step-00000000-00.png")
    assert np.abs(levels(first) - levels(sample)).max() > 2

    names = sorted(path.name for path in (tmp_path / "run/samples").glob("step-*"))
    both = [f"step-0000000{step}-00{ending}.png" for step in (2, 4) for ending in ("-last", "")]
    assert names == ["step-00000000-00.png", *both]


def test_a_resumed_run_paints_only_what_is_missing(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    folder = tmp_path / "run" / "samples"
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2},
        samples={"every": 1, "steps": 1, "prompts": ["a", "b"]}, train={"ema_decay": 0.0},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings, stop_after=2)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("step-*")}
    height = Image.open(folder / "sheet.png").height
    assert len(times) == 3 * 2

    run(chosen, tmp_path / "run", settings)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(folder.glob("step-*"))) == 5 * 2
    assert Image.open(folder / "sheet.png").height > height * 1.5


def test_with_other_settings_later_samples_are_painted_anew(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    adapter, sampling = {"rank": 2}, {"every": 1, "steps": 1}
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter=adapter, samples=sampling,
        train={"save_steps": 2, "keep": 5},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    before = {step: (tmp_path / f"run/samples/step-0000000{step}-00.png").read_bytes() for step in (2, 3, 4)}
    (tmp_path / "run/step-00000004").rename(tmp_path / "removed")

    faster = chosen.model_copy(update={"train": chosen.train.model_copy(update={"learning_rate": 0.1})})
    run(faster, tmp_path / "run", settings)
    after = {step: (tmp_path / f"run/samples/step-0000000{step}-00.png").read_bytes() for step in (2, 3, 4)}
    assert after[2] == before[2] and after[3] != before[3] and after[4] != before[4]


def test_the_default_prompt_is_the_first_caption_of_the_subject():
    settings = checked(
        {"data": {"trigger": "zorb", "class_word": "a cat", "prefix": "photo of"},
         "train": {"steps": 1, "batch": 1, "learning_rate": 1}}
    )  # fmt: skip
    cat = Record(Path("c"), "c", ("a cat",), regularization=True)
    assert default_prompt(settings, [cat, Record(Path("a"), "a", ("zorb, red",))]) == "photo of zorb, red"
    assert default_prompt(settings, [cat, Record(Path("a"), "a", (" ",))]) == "photo of zorb a cat"


@pytest.mark.parametrize(
    "caption", ["zorb (blue:1.3), [red]", r"a \(tag\) of \ zorb", "a BREAK (", "a ((zorb))", "[a|b]"]
)
def test_the_default_prompt_means_the_caption_as_it_is(caption: str):
    settings = checked({"train": {"steps": 1, "batch": 1, "learning_rate": 1}})
    prompt = default_prompt(settings, [Record(Path("a"), "a", (caption,))])
    assert parse(prompt) == [(caption, 1.0)]


def test_samples_have_the_size_of_most_pictures():
    assert most_common([(64, 96), (64, 64), (64, 96), (128, 64)]) == (64, 96)
    assert most_common([(64, 64), (128, 128)]) == (128, 128)


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.int32)
