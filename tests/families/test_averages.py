"""Names of averages get their dots back, for every U-Net of the catalog."""

from __future__ import annotations

import pytest

from gouache.families.averages import as_weights, weight_name
from gouache.families.catalog import FAMILIES
from gouache.families.identify import identify
from gouache.layouts.original import unet_shapes
from tests.families.records import official, record

UNETS = [family for family in FAMILIES if family.unet is not None and family.name != "svd"]


@pytest.mark.parametrize("family", UNETS, ids=lambda family: family.name)
def test_every_name_of_a_unet_is_restored(family):
    for name in unet_shapes(family.unet):
        average = "model_ema.diffusion_model" + name.replace(".", "")
        assert weight_name(average) == f"model.diffusion_model.{name}"


OTHERS = [
    "model_ema.decay",
    "model_ema.num_updates",
    "model_ema.diffusion_modelother0weight",
    "model_ema.diffusion_modelinput_blocks",
    "model_ema.encoderconv_inweight",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_not_changed(name: str):
    assert weight_name(name) is None


def test_a_file_with_only_averages_has_a_unet():
    stem = "model.diffusion_model."
    renamed = {
        "model_ema." + name[6:].replace(".", "") if name.startswith(stem) else name: info
        for name, info in official("sd15_emaonly").items()
    }
    file = record(renamed)

    found = identify(file)

    assert set(found.components) == {"unet", "vae", "text_encoder"} and not found.missing and not found.unknown
    assert found.ema is not None and found.ema.value == "only"
    sources = {source for origin in found.components["unet"].origins.values() for source in origin.sources}
    assert len(sources) == 686 and all(source.startswith("model_ema.") for source in sources)
    assert set(as_weights(file)) == set(official("sd15_emaonly"))


def test_averages_beside_weights_stay_averages():
    file = record(official("sd15_emaonly") | {"model_ema.decay": official("sd15_emaonly")["betas"]})

    assert as_weights(file) is file
