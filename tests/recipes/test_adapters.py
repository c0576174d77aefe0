"""The three small adapters: a short run of each writes a file that attaches in full and changes mini's pictures."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import gouache
from recipes.adapters import fit
from recipes.adapters.pictures import character, night
from tests.recipes.subset import FONT, THINGS


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("night", "night.safetensors", "locon"),
        ("zorblax", "zorblax.pt", "embedding"),
        ("rosy", "rosy.pt", "hypernetwork"),
    ],
)
def test_each_adapter_attaches_in_full_and_detaches(
    name: str, file: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(1)
    monkeypatch.setattr(fit, "load_things", lambda: THINGS)
    assert fit.main([str(tmp_path), "--only", name, "--steps", "2", "--scenes", "4", "--font", str(FONT)]) == 0
    model = gouache.load("mini", device="cpu", dtype="fp32")
    knobs = {"steps": 2, "seed": 1}
    plain = next(model.paint("a zorblax on a red background", **knobs))

    attached = model.attach(tmp_path / file)

    assert (attached.kind, attached.unmatched, attached.wrong_shape) == (kind, {}, {}) and attached.matched
    assert not torch.equal(next(model.paint("a zorblax on a red background", **knobs)).latent, plain.latent)
    attached.detach()
    assert torch.equal(next(model.paint("a zorblax on a red background", **knobs)).latent, plain.latent)


def test_a_missing_font_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit.main([str(tmp_path / "out"), "--font", str(tmp_path / "missing.ttf")]) == 2

    assert capsys.readouterr().err.startswith("error: font: there is no file ")
    assert not (tmp_path / "out").exists()


def test_the_character_is_inside_the_frame_and_in_its_caption():
    for seed in range(20):
        picture, caption = character(Random(seed), 128)
        pixels = np.asarray(picture, np.int16)
        violet = np.abs(pixels - (138, 66, 196)).max(2) < 20
        assert "zorblax" in caption and 0.05 < violet.mean() < 0.5
        assert not violet[:8].any() and not violet[-8:].any()


def test_night_is_dark_and_blue():
    dark = np.asarray(night(Image.new("RGB", (4, 4), (200, 200, 200))), np.int16)[0, 0]

    assert dark[0] < dark[1] < dark[2] < 200
