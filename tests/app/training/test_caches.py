"""Caches of a run: what is changed is made anew, nothing else; the loss is that without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.training.run_settings import RunSettings
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]


def chosen_for(model: Path, pictures: Path, tmp_path: Path, **tables: Any) -> RunSettings:
    data = {"cache_folder": str(tmp_path / "cache"), **tables.pop("data", {})}
    usual = {"adapter": {"rank": 2}, "validation": {"probe": 0}, "train": {"steps": 5, "batch": 1}, **tables}
    return settings_of(model, pictures, tmp_path / "out.safetensors", data=data, **usual)


def files(folder: Path) -> dict[Path, int]:
    """The entries of latents, each a file, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "latents").rglob("*.safetensors")}


def texts(folder: Path) -> set[str]:
    found = set[str]()
    for path in (folder / "texts").glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= set(opened.metadata() or {})
    return found


@pytest.mark.parametrize(
    "kind", ["caption", *(pytest.param(each, marks=pytest.mark.full) for each in ("pixel", "vae", "nothing"))]
)
def test_what_is_edited_is_made_anew_and_nothing_else(
    kind: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model = narrow("sd1").file
    run(chosen_for(model, pictures, tmp_path), tmp_path / "first", settings)
    before, before_texts = files(tmp_path / "cache"), texts(tmp_path / "cache")
    assert (len(before), len(before_texts)) == (5, 6)  # five captions and the empty one

    if kind == "pixel":
        with Image.open(pictures / "2.png") as picture:
            picture.load()
        picture.putpixel((5, 5), (1, 2, 3))
        picture.save(pictures / "2.png")
    elif kind == "caption":
        (pictures / "2.txt").write_text("zorb, something else")
    elif kind == "vae":

        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = "first_stage_model.encoder.conv_in.weight"
            tensors[name] = tensors[name] * 1.01

        model = altered(model, tmp_path / "other.safetensors", change)
    run(chosen_for(model, pictures, tmp_path), tmp_path / "second", settings)

    after, after_texts = files(tmp_path / "cache"), texts(tmp_path / "cache")
    assert {path: time for path, time in after.items() if path in before} == before
    assert len(after) - len(before) == {"pixel": 1, "vae": 5}.get(kind, 0)
    assert len(after_texts - before_texts) == {"caption": 1}.get(kind, 0)
    assert before_texts <= after_texts


VARIED = {"shuffle": True, "flip": True, "random_crop": True, "color": True, "tag_dropout": 0.3, "caption_dropout": 0.3}


@pytest.mark.parametrize(
    "family",
    [pytest.param("sd1", marks=pytest.mark.full), "sdxl", pytest.param("sd1-inpainting", marks=pytest.mark.full)],
)
def test_the_loss_with_caches_is_that_without(
    family: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    losses = dict[str, list[float]]()
    for name, data in (("cached", {}), ("again", {}), ("not", {"cache": False})):
        chosen = chosen_for(narrow(family).file, pictures, tmp_path, data={**VARIED, **data}, train={"batch": 2})
        run(chosen, tmp_path / name, settings)
        losses[name] = [line["loss"] for line in RunFolder(tmp_path / name).log() if "loss" in line]
    assert losses["cached"] == losses["again"] and len(losses["not"]) == 4
    assert losses["cached"] == pytest.approx(losses["not"], rel=1e-6, abs=1e-6)


def test_shuffle_dropout_flips_and_crops_go_on_through_the_caches(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    (pictures / "1.png").unlink()
    data = {**VARIED, "tag_dropout": 0.0, "cache_variations": 3}
    chosen = chosen_for(narrow("sd1").file, pictures, tmp_path, data=data, train={"steps": 40})
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"resolution": [64]})})
    with prepare.prepared(
        chosen, RunFolder(tmp_path / "run"), settings, on_note=lambda line: None,
        on_work=lambda what, done, total: None,
    ) as found:  # fmt: skip
        examples = [each for number in range(40) for each in found.batches.examples(number)]
        views = {each.view for each in examples if each.row.record.name == "0.png"}
        captions = {each.caption for each in examples if each.row.record.name == "0.png"}
        drops = sum(int(found.objective.draws(found.batches(number), number).drop.sum()) for number in range(40))
        needs = found.batches.needs(range(32))
    assert len({view.flip for view in views}) == 2 and len({view.color for view in views}) == 3
    assert len(captions) > 2 and {tuple(sorted(each.split(", "))) for each in captions} == {("number 0", "red", "zorb")}
    assert 4 <= drops <= 22  # of 40 with a chance of 0.3
    assert (needs.missing_latents, needs.missing_texts) == (0, 0)


def test_a_damaged_entry_is_made_anew(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = chosen_for(narrow("sd1").file, pictures, tmp_path)
    run(chosen, tmp_path / "first", settings)
    path = sorted(files(tmp_path / "cache"))[0]
    good = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(path.read_bytes()[:-7])
    run(chosen, tmp_path / "second", settings)
    again = load_file(path)
    assert again.keys() == good.keys() and all(torch.equal(again[name], good[name]) for name in good)
