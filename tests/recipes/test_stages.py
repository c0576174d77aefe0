"""The recipe's stages: a short training from nothing, and from the embedded model, gives a model file that paints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gouache
from gouache.app.settings import Settings
from gouache.app.training import stages as training
from gouache.app.training.stage_status import all_status
from gouache.files.open import open_model
from recipes.mini import bundle, init_text, stages, train
from recipes.mini.batches import SceneData
from recipes.mini.rendering import Glyphs
from recipes.mini.weights import network_weights
from tests.recipes.subset import THINGS

EMBEDDED = Path(gouache.__file__).parent / "embedded" / "mini.safetensors"


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """The recipe's file with two steps per stage."""
    text = train.STAGES.read_text()
    for name, number in (("steps", 2), ("batch", 2), ("warmup", 0), ("every", 1000)):
        text = re.sub(rf"^{name} = \d+", f"{name} = {number}", text, flags=re.MULTILINE)
    (tmp_path / "short.toml").write_text(text)
    return tmp_path / "short.toml"


@pytest.mark.full
@pytest.mark.parametrize("start", [None, EMBEDDED])
def test_a_short_training_gives_a_model_file_that_paints(
    start: Path | None, short: Path, glyphs: Glyphs, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(init_text, "CODE", 60)  # there are fewer things than for a code of 72 numbers
    data, folder = SceneData(THINGS, glyphs), tmp_path / "mini"
    colours = data.colour_statistics(100)
    monkeypatch.setattr(data, "colour_statistics", lambda: colours)
    train.begin(folder, short, train.initial_weights() if start is None else train.start_weights(start))
    head = None if start is None else network_weights(open_model(train.LAYOUT), "layout")
    finished = training.run(folder, settings, on_note=[].append, preparations=stages.preparations(data, head))
    assert finished.path is not None
    assert [each.to_json()["run"]["state"] for each in all_status(folder)] == ["finished"] * 3

    assert bundle.main([str(tmp_path / "mine.safetensors"), "--folder", str(folder)]) == 0
    model = gouache.load(tmp_path / "mine.safetensors", device="cpu", dtype="fp32", settings=settings)
    assert model.prediction == "v"
    assert torch.isfinite(next(model.paint("an apple", steps=2, seed=1)).latent).all()
