"""The generated names and shapes, compared with the official key lists and with the networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.families.sd import SD1, SD2
from gouache.families.sdxl import REFINER, SDXL
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.layouts.rules import plan
from gouache.layouts.text import TRANSFORMERS
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder

from .manifests import shapes


@pytest.mark.parametrize(
    ("name", "family", "in_channels"),
    [
        ("sd15_emaonly", SD1, 4),
        ("sd15_inpainting", SD1, 9),
        ("sd15_instruct_pix2pix", SD1, 8),
        ("sd21_768_v", SD2, 4),
        ("sd2_inpainting", SD2, 9),
        ("sd2_depth", SD2, 5),
        ("sdxl_base", SDXL, 4),
        ("sdxl_refiner", REFINER, 4),
    ],
)
def test_unet_names_and_shapes_are_those_of_the_official_files(name, family, in_channels):
    assert unet_shapes(replace(family.unet, in_channels=in_channels)) == shapes(name, "model.diffusion_model.")


@pytest.mark.parametrize("name", ["sd15_emaonly", "sd21_768_v", "sdxl_base", "sdxl_refiner"])
def test_vae_names_and_shapes_are_those_of_the_official_files(name):
    assert vae_shapes(VaeSpec()) == shapes(name, "first_stage_model.")


def test_text_names_and_shapes_are_those_of_the_official_file():
    official = shapes("sd15_emaonly", "cond_stage_model.transformer.")

    assert text_shapes(TextSpec()).keys() == plan(TRANSFORMERS, official).origins.keys()
    assert text_shapes(TextSpec()).items() <= official.items()


def built(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


levels = st.integers(1, 4)


@st.composite
def unet_specs(draw):
    count = draw(levels)
    return UNetSpec(
        in_channels=draw(st.sampled_from([4, 5, 8, 9])),
        channels=32 * draw(st.integers(1, 3)),
        channel_mult=tuple(draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))),
        res_blocks=draw(st.integers(1, 3)),
        attention_depth=tuple(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))),
        middle_depth=draw(st.integers(1, 2)),
        context_dim=draw(st.sampled_from([16, 48])),
        linear_projection=draw(st.booleans()),
        vector_channels=draw(st.sampled_from([0, 40])),
    )


@settings(max_examples=25, deadline=None)
@given(unet_specs())
def test_the_built_unet_has_exactly_these_names_and_shapes(spec):
    with torch.device("meta"):
        assert built(UNet(spec)) == unet_shapes(spec)


@settings(max_examples=15, deadline=None)
@given(levels, st.integers(1, 3), st.sampled_from([3, 4, 16]), st.data())
def test_the_built_autoencoder_has_exactly_these_names_and_shapes(count, blocks, latent, data):
    mult = tuple(data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    spec = VaeSpec(channels=32, channel_mult=mult, res_blocks=blocks, latent_channels=latent)

    with torch.device("meta"):
        assert built(Autoencoder(spec)) == vae_shapes(spec)


@pytest.mark.parametrize("projection", [None, 48])
def test_the_built_text_encoder_has_exactly_these_names_and_shapes(projection):
    spec = TextSpec(width=64, layers=3, heads=1, mlp_width=96, vocabulary=99, positions=12, projection=projection)

    with torch.device("meta"):
        assert built(ClipText(spec)) == text_shapes(spec)
