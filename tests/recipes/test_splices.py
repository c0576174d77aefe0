"""The three small adapters: a short run of each writes a file that goes onto `mini` whole and changes its pictures."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import gouache
from gouache.errors import GouacheError
from recipes.mini.rendering import find_font
from recipes.splices import fit
from recipes.splices.pictures import character, night

try:
    find_font()
except GouacheError:
    pytest.skip("the emoji font is not installed", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("night", "night.safetensors", "locon"),
        ("zorblax", "zorblax.pt", "embedding"),
        ("rosy", "rosy.pt", "hypernetwork"),
    ],
)
def test_each_is_written_in_a_form_that_attaches_in_full(name: str, file: str, kind: str, tmp_path: Path):
    torch.set_num_threads(1)
    assert fit.main([str(tmp_path), "--only", name, "--steps", "2", "--scenes", "8"]) == 0
    model = gouache.load("mini", device="cpu", dtype="fp32")
    knobs = {"steps": 2, "seed": 1}
    plain = next(model.paint("a zorblax on a red background", **knobs))

    on = model.attach(tmp_path / file)

    assert (on.kind, on.unmatched, on.wrong_shape) == (kind, {}, {}) and on.matched
    assert not torch.equal(next(model.paint("a zorblax on a red background", **knobs)).latent, plain.latent)
    on.detach()
    assert torch.equal(next(model.paint("a zorblax on a red background", **knobs)).latent, plain.latent)


def test_the_character_is_where_its_caption_says(tmp_path: Path):
    for seed in range(20):
        picture, said = character(Random(seed), 128)
        pixels = np.asarray(picture, np.int16)
        violet = np.abs(pixels - (138, 66, 196)).max(2) < 20
        assert "zorblax" in said and 0.05 < violet.mean() < 0.5
        assert not violet[:8].any() and not violet[-8:].any()


def test_night_is_dark_and_blue():
    dark = np.asarray(night(Image.new("RGB", (4, 4), (200, 200, 200))), np.int16)[0, 0]

    assert dark[0] < dark[1] < dark[2] < 200
