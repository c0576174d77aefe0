"""Stable Video Diffusion's tables, compared with the official key list, diffusers' models, and a list of name pairs."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

from gouache.errors import ModelError
from gouache.layouts.diffusers import unet_topology, vae_topology
from gouache.layouts.diffusers_video import video_unet_rules, video_vae_rules
from gouache.layouts.rules import AsConv, Rename, Rule, invert, plan, prove

from .manifests import Shapes, shapes
from .svd_names import pairs

UNET, FIRST_STAGE, FRAME_VAE = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.3.encoder."


def vae_shapes() -> Shapes:
    """The parts of a folder's `vae`: the decoder of one autoencoder, and the encoder of the one for the first frame."""
    decoder = {name: shape for name, shape in shapes("svd", FIRST_STAGE).items() if name.startswith("decoder.")}
    frame = shapes("svd", FRAME_VAE)
    return decoder | {name: shape for name, shape in frame.items() if name.startswith(("encoder.", "quant_conv."))}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def released_unet() -> Shapes:
    with torch.device("meta"):
        return shapes_of(
            UNetSpatioTemporalConditionModel(
                sample_size=96,
                in_channels=8,
                out_channels=4,
                down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
                up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
                block_out_channels=(320, 640, 1280, 1280),
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=768,
                layers_per_block=2,
                cross_attention_dim=1024,
                transformer_layers_per_block=1,
                num_attention_heads=(5, 10, 20, 20),
                num_frames=14,
            )
        )


def released_vae() -> Shapes:
    with torch.device("meta"):
        return shapes_of(
            AutoencoderKLTemporalDecoder(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=768,
            )
        )


def moved(rules, old: Shapes) -> Shapes:
    return {name: origin.shape(old) for name, origin in prove(rules, old).origins.items()}


@pytest.mark.parametrize("name", ["svd", "svd_xt"])
def test_the_official_unet_names_map_to_diffusers_names_and_back(name):
    official, theirs = shapes(name, UNET), released_unet()
    rules = video_unet_rules(*unet_topology(theirs))

    assert moved(rules, theirs) == official
    assert moved(invert(rules), official) == theirs


def test_the_official_autoencoder_names_map_to_diffusers_names_and_back():
    official, theirs = vae_shapes(), released_vae()
    levels, old_attention = vae_topology(theirs)
    rules = video_vae_rules(levels)

    assert (levels, old_attention) == (4, False)
    assert moved(rules, theirs) == official
    assert moved(invert(rules), official) == theirs


TABLES = {
    "unet": (video_unet_rules((True, True, True, False), 2), pairs(UNET, "unet")),
    "vae": (video_vae_rules(4), pairs(FIRST_STAGE, "vae") | pairs(FRAME_VAE, "vae")),
}


@pytest.mark.parametrize("table", TABLES)
def test_names_with_equal_shapes_map_as_in_the_list_of_pairs(table):
    rules, stated = TABLES[table]

    there = plan(rules, stated.values()).origins
    back = plan(invert(rules), stated).origins

    assert {name: origin.sources[0] for name, origin in there.items()} == stated
    assert {origin.sources[0]: name for name, origin in back.items()} == stated


def layer(rule: Rule) -> str:
    """The layer that a rule maps, independent of its position in the network: its name without blocks and numbers."""
    assert isinstance(rule, Rename | AsConv)
    inner = re.sub(r"^.*\.(resnets|attentions)\.(\d+|\{\w\})\.", "", rule.source)
    return ".".join("N" if part.isdecimal() or part in ("{i}", "{j}") else part for part in inner.split("."))


@pytest.mark.parametrize("table", TABLES)
def test_the_list_of_pairs_covers_every_kind_of_layer(table):
    """A kind of layer that is in no pair might be swapped with another one of the same shape."""
    rules, stated = TABLES[table]
    used = {origin.rule for origin in plan(rules, stated.values()).origins.values()}

    covered = {layer(rule) for rule in used}
    never_present = {"post_quant_conv.{leaf}"}  # a rule of the ordinary autoencoder; in no folder of this line
    assert {layer(rule) for rule in rules} - covered <= never_present


@pytest.mark.parametrize(
    ("attends", "blocks"), [((False, True), 1), ((True, False, True), 3), ((True,) * 5, 2)], ids=str
)
def test_other_topologies_are_read_from_diffusers_names(attends, blocks):
    with torch.device("meta"):
        theirs = shapes_of(
            UNetSpatioTemporalConditionModel(
                block_out_channels=(32,) * len(attends),
                down_block_types=tuple(f"{'CrossAttn' * here}DownBlockSpatioTemporal" for here in attends),
                up_block_types=tuple(f"{'CrossAttn' * here}UpBlockSpatioTemporal" for here in reversed(attends)),
                num_attention_heads=(1,) * len(attends),
                layers_per_block=blocks,
                cross_attention_dim=16,
            )
        )

    assert unet_topology(theirs) == (attends, blocks)
    ours = moved(video_unet_rules(attends, blocks), theirs)
    assert len(ours) == len(theirs)
    assert moved(invert(video_unet_rules(attends, blocks)), ours) == theirs


@pytest.mark.parametrize("extra", ["down_blocks.0.motion_modules.0.norm.weight", "mid_block.resnets.0.conv1.weight"])
def test_a_tensor_that_is_not_in_the_table_is_an_error(extra):
    theirs = released_unet() | {extra: (320,)}

    with pytest.raises(ModelError, match=extra.replace(".", r"\.")):
        prove(video_unet_rules(*unet_topology(theirs)), theirs)
