from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.errors import ModelError
from gouache.families.sd import CLIP_L, SD1, SD2
from gouache.families.sdxl import REFINER, SDXL
from gouache.families.shapes import check_heads_divide, text_config, text_spec, unet_heads, unet_spec, vae_spec
from gouache.layouts.diffusers import unet_rules, unet_topology
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.layouts.rules import plan
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec

from .records import official


def shapes(name, prefix):
    return {key.removeprefix(prefix): info.shape for key, info in official(name).items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "family", "in_channels"),
    [
        ("sd15_emaonly", SD1, 4),
        ("sd15_inpainting", SD1, 9),
        ("sd15_instruct_pix2pix", SD1, 8),
        ("sd21_768_v", SD2, 4),
        ("sd2_depth", SD2, 5),
        ("sdxl_base", SDXL, 4),
        ("sdxl_refiner", REFINER, 4),
    ],
)
def test_official_unets_are_read_as_the_released_configurations(name, family, in_channels):
    found = unet_spec(shapes(name, "model.diffusion_model."))

    assert found == replace(family.unet, in_channels=in_channels)


def test_official_autoencoder_and_text_encoder_are_read_as_the_released_configurations():
    assert vae_spec(shapes("sdxl_vae", "")) == VaeSpec()
    assert text_spec(shapes("sd15_emaonly", "cond_stage_model.transformer."), "quick_gelu") == CLIP_L


@st.composite
def unet_specs(draw):
    count = draw(st.integers(1, 5))
    depth = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    linear = draw(st.booleans())
    return UNetSpec(
        in_channels=draw(st.integers(1, 12)),
        out_channels=draw(st.integers(1, 8)),
        channels=32 * draw(st.integers(1, 12)),
        channel_mult=tuple(draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))),
        res_blocks=draw(st.integers(1, 4)),
        attention_depth=tuple(depth),
        middle_depth=draw(st.integers(1, 3)),
        heads=None if linear else 8,
        head_channels=64 if linear else None,
        context_dim=draw(st.integers(1, 3000)),
        linear_projection=linear,
        vector_channels=draw(st.sampled_from([0, 1, 2816])),
    )


@settings(max_examples=60, deadline=None)
@given(unet_specs())
def test_a_unet_of_any_widths_and_depths_is_read_back(spec):
    assert unet_spec(unet_shapes(spec)) == spec


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 16), st.integers(1, 4))
def test_an_autoencoder_of_any_widths_and_depths_is_read_back(mult, blocks, latent, images):
    spec = VaeSpec(
        channels=64, channel_mult=tuple(mult), res_blocks=blocks, latent_channels=latent, image_channels=images
    )

    assert vae_spec(vae_shapes(spec)) == spec


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 300), st.sampled_from([None, 7, 64]))
def test_a_text_encoder_of_any_widths_and_depths_is_read_back(heads, layers, positions, projection):
    spec = TextSpec(
        width=64 * heads, heads=heads, layers=layers, positions=positions, projection=projection, activation="gelu"
    )

    assert text_spec(text_shapes(spec), "gelu") == spec


def test_levels_with_different_numbers_of_blocks_are_refused():
    uneven = {name: shape for name, shape in unet_shapes(UNetSpec()).items() if not name.startswith("input_blocks.11.")}

    with pytest.raises(ModelError, match=r"\[2, 2, 2, 1\] residual blocks"):
        unet_spec(uneven)


def test_widths_that_are_not_multiples_of_the_first_are_refused():
    changed = unet_shapes(UNetSpec()) | {"input_blocks.4.0.out_layers.3.weight": (500, 500, 3, 3)}

    with pytest.raises(ModelError, match="not multiples"):
        unet_spec(changed)


@pytest.mark.parametrize("stated", [4, [1, 2, 2], (2, 2, 2)])
def test_heads_equal_those_that_diffusers_builds_from_the_same_config(stated):
    config = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": stated,
        "cross_attention_dim": 16,
    }
    with torch.device("meta"):
        model = UNet2DConditionModel(norm_num_groups=32, **config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = plan(unet_rules(*unet_topology(theirs)), theirs)
    spec = unet_spec({name: origin.shape(theirs) for name, origin in table.origins.items()})

    found = unet_heads(spec, config | {"attention_head_dim": stated if isinstance(stated, int) else list(stated)})

    built = [model.down_blocks[level].attentions[0].transformer_blocks[0].attn1.heads for level in (0, 1)]
    assert [found.heads or width // (found.head_channels or 1) for width in (32, 64)] == built


@pytest.mark.parametrize("stated", [[1, 2], [0, 1, 1, 1], ["a"] * 4, "8", [8, 8, 4, 4]])
def test_invalid_heads_are_refused(stated):
    with pytest.raises(ModelError, match="heads"):
        unet_heads(UNetSpec(), {"attention_head_dim": stated})


def test_widths_that_are_not_divisible_by_the_heads_are_refused():
    with pytest.raises(ModelError, match="level 1 has width 96, which is not divisible into heads of 64 channels"):
        check_heads_divide(
            UNetSpec(channels=96, channel_mult=(2, 1), attention_depth=(1, 1), heads=None, head_channels=64)
        )


def test_a_text_config_overrides_heads_and_activation():
    config = {"num_attention_heads": 4, "hidden_act": "gelu"}

    assert text_config(CLIP_L, config) == replace(CLIP_L, heads=4, activation="gelu")


@pytest.mark.parametrize("config", [{"num_attention_heads": 7}, {"num_attention_heads": "x"}, {"hidden_act": "relu"}])
def test_an_invalid_text_config_is_refused(config):
    with pytest.raises(ModelError, match=r"config\.json"):
        text_config(CLIP_L, config)
