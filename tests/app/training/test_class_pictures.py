"""Pictures of the class: where they are kept, when they are missing, and that what is painted depends on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gouache.app import hashes
from gouache.app.settings import Settings
from gouache.app.training import estimate, prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.memory_use import MemoryUse
from gouache.app.training.pictures import batches_of, class_folder, read_pictures
from gouache.errors import GouacheError
from gouache.files.open import open_model
from gouache.training.run_settings import RunSettings
from tests.app.training.short_runs import settings_of
from tests.pipelines import Narrow

Small = Callable[..., RunSettings]


@pytest.fixture
def small(narrow: Callable[[str], Narrow], pictures: Path, tmp_path: Path) -> Small:
    """Settings of a run that is to paint two pictures of a class, with other `tables`."""

    def make(**tables: Any) -> RunSettings:
        usual: dict[str, Any] = {
            "adapter": {"rank": 2},
            "loss": {"prior": "pictures"},
            "data": {"class_word": "a cat", "class_pictures": 2, "trigger": "zorb"},
        }
        for name, value in tables.items():
            usual[name] = {**usual.get(name, {}), **value}
        return settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", **usual)

    return make


def quiet(*_: Any) -> None:
    pass


def read(chosen: RunSettings, tmp_path: Path, user: Settings) -> Any:
    return read_pictures(chosen, RunFolder(tmp_path / "run"), quiet, user)


@pytest.mark.parametrize("prior", ["none", "pictures", "model"])
@pytest.mark.parametrize("what", ["absent", "empty", "hidden"])
def test_a_folder_without_pictures_of_the_class_is_refused_if_none_are_painted(
    what: str, prior: str, small: Small, settings: Settings, tmp_path: Path
):
    folder = tmp_path / "cats"
    if what != "absent":
        folder.mkdir()
    if what == "hidden":
        (folder / ".gouache-1.tmp").write_bytes(b"half")
    data = {"class_folder": str(folder), "class_pictures": 2 if prior == "none" else 0}
    problem = "does not exist" if what == "absent" else "has no pictures"
    with pytest.raises(GouacheError, match=rf"cats: {problem}; data\.class_folder") as caught:
        read(small(data=data, loss={"prior": prior}), tmp_path, settings)
    assert "\n" not in str(caught.value)


def test_a_prior_without_pictures_is_refused_with_what_to_set(small: Small, settings: Settings, tmp_path: Path):
    with pytest.raises(GouacheError, match=r"loss\.prior: .*class_word and data\.class_pictures .*prior = model"):
        read(small(data={"class_pictures": 0}), tmp_path, settings)
    with pytest.raises(GouacheError, match=r"data\.class_word: is missing"):
        read(small(data={"class_word": ""}), tmp_path, settings)
    assert read(small(), tmp_path, settings).training  # will be painted


def test_the_folder_differs_with_what_decides_the_look_and_with_nothing_else(small: Small, settings: Settings):
    def folder(**tables: Any) -> Path:
        found = class_folder(small(**tables), settings)
        assert found is not None
        return found

    usual = folder()
    words = ("кот", "собака", "猫", "犬", "a dog", "A cat", "!", "?")
    others = [
        *(folder(data={"class_word": word}) for word in words),
        *(folder(data={"resolution": each}) for each in ([128], ["128x64"], [])),
        *(
            folder(model=each)
            for each in ({"vae": "none"}, {"prediction": "v"}, {"clip_skip": 2}, {"sha256": "0" * 64})
        ),
    ]
    assert len({usual, *others}) == 1 + len(others)
    assert usual.name.startswith("a-cat-") and others[0].name.startswith("кот-")
    digest = hashes.sha256(open_model(Path(small().model.name)), settings)
    same = [
        folder(model={"sha256": digest}),
        folder(model={"zero_terminal_snr": True}),
        folder(data={"resolution": ["64x64"]}),
        folder(data={"class_pictures": 9}),
    ]
    assert {*same} == {usual}


def test_zero_terminal_snr_changes_no_class_picture(small: Small, settings: Settings, tmp_path: Path):
    found = list[Any]()
    for zero in (False, True):
        folder = tmp_path / str(zero)
        chosen = small(
            data={"class_pictures": 1, "class_folder": str(folder), "cache": False},
            model={"zero_terminal_snr": zero, "prediction": "v"}, validation={"probe": 0},
        )  # fmt: skip
        with prepare.prepared(chosen, RunFolder(tmp_path / "run"), settings, on_note=quiet, on_work=quiet) as ready:
            assert (ready.objective.schedule.sigma_max > 1000) == zero
        (path,) = folder.iterdir()
        found.append(np.asarray(Image.open(path)))
    assert np.array_equal(*found)


@pytest.mark.full
def test_what_is_foreseen_is_the_same_before_and_after_painting(
    small: Small, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(estimate, "available", lambda device: 1)  # no step is timed
    monkeypatch.setattr(estimate.memory_use, "memory_use", lambda *_: MemoryUse(0, 0, 0, 0))
    chosen = small(data={"class_word": "a foreseen cat"}, validation={"probe": 0})

    def foreseen() -> tuple[int, float, int]:
        found = estimate.estimate(chosen, RunFolder(tmp_path / "other"), settings, on_note=quiet)
        return found.class_pictures, found.epochs, batches_of(chosen, 1, settings, (64, 64))

    before = foreseen()
    with prepare.prepared(chosen, RunFolder(tmp_path / "run"), settings, on_note=quiet, on_work=quiet) as ready:
        batches = len(ready.batches)
    assert before == (2, pytest.approx(4 / batches), batches)
    assert foreseen() == (0, pytest.approx(4 / batches), batches)


def test_all_class_pictures_are_cached_before_the_first_step(small: Small, settings: Settings, tmp_path: Path):
    for name in ("a", *(f"b{number}" for number in range(10))):
        (tmp_path / name[0]).mkdir(exist_ok=True)
        noise = np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / name[0] / f"{name}.png")
    chosen = small(
        data={"folder": str(tmp_path / "a"), "class_folder": str(tmp_path / "b"), "class_pictures": 0},
        train={"steps": 20, "batch": 1}, validation={"probe": 0},
    )  # fmt: skip
    with prepare.prepared(chosen, RunFolder(tmp_path / "run"), settings, on_note=quiet, on_work=quiet) as ready:
        needs = ready.batches.needs(range(20))
    assert (needs.latents, needs.missing_latents, needs.missing_texts) == (11, 0, 0)


def test_a_share_of_dropped_captions_is_common_if_the_class_has_it_too(
    small: Small, settings: Settings, tmp_path: Path
):
    (tmp_path / "a" / "6_zorb").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for name in ("a/6_zorb/0.png", "b/1.png"):
        Image.new("RGB", (64, 64), "red" if name[0] == "a" else "blue").save(tmp_path / name)
    for other, expected in ((0.5, (0.5, [0, 0])), (0.0, (0.0, [0.5, 0]))):
        (tmp_path / "data.toml").write_text(
            f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a/6_zorb'\ncaption_dropout_rate = 0.5\n"
            f"[[datasets.subsets]]\nimage_dir = 'b'\nis_reg = true\ncaption_dropout_rate = {other}\n"
        )
        found = read(small(data={"folder": str(tmp_path / "data.toml"), "class_pictures": 0}), tmp_path, settings)
        assert [each.regularization for each in found.training] == [False, True]
        assert (found.caption_dropout, [each.caption_options.dropout for each in found.training]) == expected
