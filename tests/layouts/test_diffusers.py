"""The diffusers tables, compared with official key lists, with diffusers' models, and with diffusers' conversion."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from gouache.errors import ModelError
from gouache.layouts.diffusers import unet_rules, unet_topology, vae_rules, vae_topology
from gouache.layouts.rules import invert, plan, prove

from .manifests import folder_shapes, shapes


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def moved_shapes(rules, old):
    return {name: origin.shape(old) for name, origin in prove(rules, old).origins.items()}


@pytest.mark.parametrize(("folder", "file"), [("diffusers_sd15", "sd15_emaonly"), ("diffusers_sdxl_base", "sdxl_base")])
def test_official_unet_folders_become_the_official_single_files(folder, file):
    old = folder_shapes(folder, "unet")

    new = moved_shapes(unet_rules(*unet_topology(old)), old)

    assert new == shapes(file, "model.diffusion_model.")


@pytest.mark.parametrize(("folder", "file"), [("diffusers_sd15", "sd15_emaonly"), ("diffusers_sdxl_base", "sdxl_base")])
def test_official_vae_folders_become_the_official_single_files(folder, file):
    old = folder_shapes(folder, "vae")

    new = moved_shapes(vae_rules(*vae_topology(old)), old)

    assert new == shapes(file, "first_stage_model.")


UNETS = {
    "sd1": {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 16,
    },
    "sd2": {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": [1, 2, 2, 2],
        "use_linear_projection": True,
        "cross_attention_dim": 16,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
        "cross_attention_dim": 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "refiner": {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": [1, 2, 2, 2],
        "use_linear_projection": True,
        "cross_attention_dim": 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,
    },
    "two levels, one block": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
    },
    "five levels, three blocks": {
        "block_out_channels": (32, 32, 64, 64, 64),
        "layers_per_block": 3,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D") + ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": 16,
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_tables_agree_with_the_conversion_in_diffusers(name):
    with torch.device("meta"):
        model = UNet2DConditionModel(norm_num_groups=32, **UNETS[name])
    theirs = shapes_of(model)

    origins = prove(unet_rules(*unet_topology(theirs)), theirs).origins
    file = {f"model.diffusion_model.{ours}": ours for ours in origins}
    converted = convert_ldm_unet_checkpoint(file, dict(model.config))

    assert converted == {origin.sources[0]: ours for ours, origin in origins.items()}


VAES = {
    "three levels": {"block_out_channels": (32, 32, 64), "layers_per_block": 1},
    "four levels": {"block_out_channels": (32, 64, 64, 96), "layers_per_block": 2, "latent_channels": 8},
}


def vae(name):
    levels = len(VAES[name]["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
        **VAES[name],
    )


@pytest.mark.parametrize("name", VAES)
def test_the_conversion_in_diffusers_restores_its_vae_names_from_ours(name):
    model = vae(name)
    theirs = model.state_dict()

    origins = plan(vae_rules(*vae_topology(theirs)), theirs).origins
    ours = {f"first_stage_model.{key}": origin.tensor(theirs.__getitem__) for key, origin in origins.items()}
    restored = convert_ldm_vae_checkpoint(ours, dict(model.config))

    assert ours["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    assert restored.keys() == theirs.keys()
    assert all(torch.equal(restored[key], theirs[key]) for key in theirs)


def test_old_names_of_vae_attention_give_the_same_tensors_as_new_ones():
    new = vae("three levels").state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in new.items():
        head, _, tail = name.partition("attentions.0.")
        for now, before in old_names.items():
            tail = tail.replace(now, before)
        old[name if not tail else f"{head}attentions.0.{tail}"] = tensor

    table = vae_rules(*vae_topology(old))
    from_old = {key: origin.tensor(old.__getitem__) for key, origin in plan(table, old).origins.items()}
    from_new = plan(vae_rules(*vae_topology(new)), new).origins

    assert old.keys() != new.keys()
    prove(table, {name: tuple(tensor.shape) for name, tensor in old.items()})
    assert from_old.keys() == from_new.keys()
    assert all(torch.equal(from_old[key], from_new[key].tensor(new.__getitem__)) for key in from_new)


def test_the_inverse_table_gives_the_names_and_shapes_that_diffusers_expects():
    official = shapes("sdxl_base", "model.diffusion_model.")

    back = plan(invert(unet_rules((False, True, True), 2)), official)

    assert {name: o.shape(official) for name, o in back.origins.items()} == folder_shapes("diffusers_sdxl_base", "unet")


def test_a_tensor_that_is_not_in_the_table_is_an_error():
    old = folder_shapes("diffusers_sd15", "unet") | {"down_blocks.0.motion_modules.0.norm.weight": (320,)}

    with pytest.raises(ModelError, match="motion_modules"):
        prove(unet_rules(*unet_topology(old)), old)
