"""Components: complete, damaged, absent, narrower than released, alone in a file, with older and newer names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.errors import ModelError
from gouache.families.catalog import family_named
from gouache.families.identify import identify
from gouache.families.sd import OPENCLIP_H, SD1, SD2
from gouache.families.sdxl import OPENCLIP_BIGG, REFINER, SDXL
from gouache.files.record import TensorInfo
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec

from .records import infos, narrow, official, official_folder, openclip_shapes, record

SD = {"unet", "vae", "text_encoder"}

OFFICIAL = {name: official(name) for name in ("sd15_emaonly", "sd2_inpainting", "sdxl_base", "sdxl_refiner")}
# The tensors that each component needs. SD2 does not use its projection, and its folders do not have it.
NEEDED = {
    (name, part.name): sorted(
        {s for o in part.origins.values() for s in o.sources} - {"cond_stage_model.model.text_projection"}
    )
    for name, tensors in OFFICIAL.items()
    for part in identify(record(tensors)).components.values()
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_component_without_any_one_of_its_tensors_is_reported_missing_and_no_other_is(data):
    name, part = data.draw(st.sampled_from(sorted(NEEDED)))
    removed = data.draw(st.sampled_from(NEEDED[name, part]))

    found = identify(record({key: info for key, info in OFFICIAL[name].items() if key != removed}))

    assert found.kind.value == "checkpoint"
    assert set(found.components) == {other for file, other in NEEDED if file == name} - {part}
    assert set(found.missing) == {part}
    assert "missing" in found.missing[part]
    with pytest.raises(ModelError, match=f"no usable {part}"):
        found.component(part)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(OFFICIAL)), st.booleans(), st.data())
def test_a_component_with_a_tensor_of_the_wrong_shape_or_name_is_reported_missing(name, reshape, data):
    # The width of the extra vector is read from this tensor alone, so any is possible. Loading compares it with that of
    # the text encoders: tests/cli/test_bad_models.py.
    free = {"model.diffusion_model.label_emb.0.0.weight"} if reshape else set()
    changed = data.draw(st.sampled_from([each for each in NEEDED[name, "unet"] if each not in free]))
    tensors = dict(OFFICIAL[name])
    info = tensors.pop(changed)
    if reshape:
        tensors[changed] = TensorInfo((*info.shape[:-1], info.shape[-1] + 1), info.dtype)
    else:
        tensors[changed + "_orig"] = info

    found = identify(record(tensors))

    assert set(found.missing) == {"unet"}


@pytest.mark.parametrize("part", sorted(SD | {"text_encoder_2"}))
def test_an_absent_component_is_reported_missing(part):
    prefix = next(location.prefix for location in SDXL.locations if location.component == part)

    found = identify(record({k: v for k, v in official("sdxl_base").items() if not k.startswith(prefix)}))

    assert found.family.value is SDXL
    assert found.missing == {part: f"not in the file; single files keep it under {prefix}"}


NARROW = {
    "sd1": UNetSpec(channels=32, channel_mult=(1, 2, 3, 3), context_dim=64),
    "sd2": UNetSpec(channels=64, heads=None, head_channels=64, context_dim=128, linear_projection=True),
    "sdxl": replace(
        SDXL.unet, channels=64, attention_depth=(0, 1, 2), middle_depth=2, context_dim=192, vector_channels=99
    ),
    "sdxl-refiner": replace(REFINER.unet, channels=64, context_dim=128, vector_channels=99),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrower_models_of_the_same_topology_are_recognised_with_their_widths(name):
    family = family_named(name)

    found = identify(record(narrow(family, NARROW[name])), prediction="eps")

    assert found.kind.value == "checkpoint"
    assert (found.family.value, found.family.confidence) == (family, "certain")
    assert (found.missing, found.unknown) == ({}, ())
    assert found.component("unet").spec == NARROW[name]
    assert found.variant.value == "base"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "unet/"])
@pytest.mark.parametrize("family", [SD1, SD2, SDXL, REFINER], ids=lambda family: family.name)
def test_a_unet_alone_is_recognised_with_or_without_a_prefix(family, prefix):
    found = identify(record(infos(unet_shapes(family.unet), prefix)), prediction="eps")

    assert found.kind.value == "unet"
    assert found.family.value is family
    assert found.component("unet").spec == family.unet
    assert set(found.missing) == {location.component for location in family.locations} - {"unet"}


@pytest.mark.parametrize(
    ("shapes", "spec", "family"),
    [
        (text_shapes(TextSpec()), TextSpec(), None),
        (openclip_shapes(OPENCLIP_H), OPENCLIP_H, SD2),
        (openclip_shapes(OPENCLIP_BIGG), OPENCLIP_BIGG, SDXL),
        (text_shapes(OPENCLIP_BIGG), OPENCLIP_BIGG, SDXL),
        (
            {name.removeprefix("text_model."): shape for name, shape in text_shapes(TextSpec()).items()},
            TextSpec(),
            None,
        ),
    ],
    ids=["CLIP-L", "OpenCLIP H", "OpenCLIP bigG", "bigG in a folder", "CLIP-L of transformers 5"],
)
def test_a_text_encoder_alone_is_recognised(shapes, spec, family):
    found = identify(record(infos(shapes)))

    assert found.kind.value == "text encoder"
    assert found.family.value is family
    assert found.component("text_encoder_2" if family is SDXL else "text_encoder").spec == spec


def test_the_oldest_sd1_files_without_text_model_in_their_names_are_recognised():
    old = {key.replace("transformer.text_model.", "transformer."): i for key, i in official("sd15_emaonly").items()}

    found = identify(record(old))

    assert set(found.components) == SD
    assert found.component("text_encoder").origins.keys() == text_shapes(TextSpec()).keys()


def test_averages_are_found_by_removing_dots_from_the_known_names():
    tensors = official("sd15_pruned_full")

    found = identify(record(tensors))

    averages = {key for key in tensors if key.startswith("model_ema.")} - {"model_ema.decay", "model_ema.num_updates"}
    assert set(found.ema_names.values()) == averages
    assert all(
        tensors[average].shape == tensors[f"model.diffusion_model.{name}"].shape
        for name, average in found.ema_names.items()
    )


def test_averages_of_unknown_tensors_are_reported_as_unknown():
    extra = {"model_ema.diffusion_modelinput_blocks99weight": TensorInfo((3,), "F32")}

    found = identify(record(official("sd15_pruned_full") | extra))

    assert found.unknown == tuple(extra)


def test_dtypes_are_reported_per_component():
    half = {
        key: replace(info, dtype="F16") if key.startswith("model.diffusion_model.") else info
        for key, info in official("sd15_emaonly").items()
    }
    half["model.diffusion_model.out.2.bias"] = TensorInfo((4,), "F32")

    found = identify(record(half))

    assert found.component("vae").dtype.value == "F32"
    assert found.component("unet").dtype.value == "F16 + F32"
    assert found.component("unet").dtype.evidence == "number of tensors: F16 685, F32 1"


def test_the_context_of_an_sd2_folder_with_23_blocks_is_its_last_block():
    """diffusers stores 23 of the 24 blocks, so the last one is used in a folder and the last but one in a file."""
    cut = replace(OPENCLIP_H, layers=23, projection=None)
    folder = (
        infos(unet_shapes(SD2.unet), "unet/")
        | infos(vae_shapes(VaeSpec()), "vae/")
        | infos(text_shapes(cut), "text_encoder/")
    )

    in_folder = identify(record(folder, format="diffusers folder"), prediction="eps")
    in_file = identify(record(official("sd2_inpainting")))

    assert in_folder.component("text_encoder").spec == cut
    assert in_folder.text_recipe is not None and in_file.text_recipe is not None
    assert [encoder.layer for encoder in in_folder.text_recipe.encoders] == [1]
    assert [encoder.layer for encoder in in_file.text_recipe.encoders] == [2]


def test_a_second_encoder_of_sdxl_without_its_projection_is_incomplete():
    tensors = official("sdxl_base")
    del tensors["conditioner.embedders.1.model.text_projection"]

    assert "text_projection is missing" in identify(record(tensors)).missing["text_encoder_2"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_component_of_a_folder_is_recognised_by_its_tensor_names(part):
    folder = official_folder("diffusers_sd15")
    tensors = {name.removeprefix(f"{part}/"): i for name, i in folder.tensors.items() if name.startswith(f"{part}/")}

    found = identify(
        record(tensors, format="component folder", extra={"config.json": folder.extra[f"{part}/config.json"]})
    )

    assert found.kind.value == part.replace("_", " ")
    assert found.component(part).spec == SD1.spec(part)
    assert found.unknown == ()
