"""Models of random weights: the released names and shapes, first values, sizes."""

from __future__ import annotations

import pytest
import torch

from gouache.app.settings import Settings
from gouache.app.training.pretraining import initial_model
from gouache.errors import RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.training.pretraining import initial
from gouache.training.pretraining.presets import preset, presets
from tests.layouts.manifests import shapes as official_shapes


def test_the_size_sd1_has_the_names_and_shapes_of_the_released_file():
    shapes = {**initial.file_shapes(preset("sd1")), initial.POSITIONS: (1, 77)}
    official = official_shapes("sd15_emaonly")
    model = {name: shape for name, shape in official.items() if name.startswith(tuple(initial.PREFIXES.values()))}
    assert {name: tuple(shape) for name, shape in shapes.items()} == model


@pytest.mark.parametrize("name", ["tiny", pytest.param("small", marks=pytest.mark.full)])
def test_a_file_of_each_size_is_read_as_it_is_meant(name: str, settings: Settings):
    path, chosen = initial_model(name, 0, settings), preset(name)
    found = identify(open_model(path))
    assert found.family.value is not None and found.family.value.name == "sd1" and not found.missing
    assert found.component("unet").spec == chosen.unet and found.component("vae").spec == chosen.vae
    assert found.size is not None and found.size.value == (chosen.resolution,) * 2
    before = path.stat().st_mtime_ns
    assert initial_model(name, 0, settings).stat().st_mtime_ns == before  # kept


def test_first_values(settings: Settings):
    """Zero last layers, norms that do nothing, CLIP's deviations; another seed, other weights."""
    file = open_model(initial_model("tiny", 0, settings))
    other = open_model(initial_model("tiny", 1, settings))
    for name in ("model.diffusion_model.out.2.weight", "model.diffusion_model.input_blocks.1.1.proj_out.weight"):
        assert not file.tensor(name).any()
    assert (file.tensor("first_stage_model.decoder.norm_out.weight") == 1).all()
    text = "cond_stage_model.transformer.text_model."
    assert float(file.tensor(text + "embeddings.token_embedding.weight").std()) == pytest.approx(0.02, rel=0.02)
    layer = file.tensor(text + "encoder.layers.0.self_attn.q_proj.weight")
    assert float(layer.std()) == pytest.approx(64**-0.5, rel=0.05)
    name = "first_stage_model.decoder.conv_in.weight"
    assert float(file.tensor(name).abs().max()) <= 1 / (file.tensor(name)[0].numel() ** 0.5)
    assert not torch.equal(file.tensor(name), other.tensor(name))


def test_an_unknown_size_is_named_with_the_known_ones():
    with pytest.raises(RequestError, match="'huge' is not known; use tiny, small, sd1"):
        preset("huge")
    assert list(presets()) == ["tiny", "small", "sd1"]
