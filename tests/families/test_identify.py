"""Every official key list identified, from names, shapes and metadata alone; and what happens when some are gone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.errors import ModelError, RequestError
from gouache.families.catalog import FAMILIES, family_named
from gouache.families.found import Fact
from gouache.families.identify import identify
from gouache.families.sd import OPENCLIP_H, SD1, SD2
from gouache.families.sdxl import OPENCLIP_BIGG, REFINER, SDXL
from gouache.files.record import TensorInfo
from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec

from .records import infos, manifest, narrow, official, official_folder, openclip_shapes, record

SD = {"unet", "vae", "text_encoder"}
XL = SD | {"text_encoder_2"}
VIDEO = {"unet", "vae", "image_encoder", "frame_vae"}

# name, kind, family, variant, components, EMA: as the table of the key lists and the released models have them
CHECKPOINTS = [
    ("sd15_emaonly", "checkpoint", "sd1", "base", SD, "counters"),
    ("sd15_pruned_full", "checkpoint", "sd1", "base", SD, "both"),
    ("sd15_inpainting", "checkpoint", "sd1", "inpainting", SD, "counters"),
    ("sd15_instruct_pix2pix", "checkpoint", "sd1", "instruct-pix2pix", SD, "both"),
    ("sd2_inpainting", "checkpoint", "sd2", "inpainting", SD, "counters"),
    ("sd2_depth", "checkpoint", "sd2", "depth", SD, "counters"),
    ("sdxl_base", "checkpoint", "sdxl", "base", XL, "none"),
    ("sdxl_refiner", "checkpoint", "sdxl-refiner", "base", {"unet", "vae", "text_encoder_2"}, "none"),
    ("svd", "checkpoint", "svd", None, VIDEO, "none"),
    ("svd_xt", "checkpoint", "svd", None, VIDEO, "none"),
]


@pytest.mark.parametrize(("name", "kind", "family", "variant", "components", "ema"), CHECKPOINTS)
def test_official_checkpoints_are_identified_without_reading_a_weight(name, kind, family, variant, components, ema):
    found = identify(record(official(name)))

    assert found.kind.value == kind
    assert found.family.value is not None
    assert (found.family.value.name, found.family.sure) == (family, "certain")
    assert found.variant.value == variant
    assert set(found.components) == components
    assert found.missing == {}
    assert found.unknown == ()
    assert found.ema is not None and found.ema.value == ema
    assert found.prediction is not None and found.prediction.value == ("v" if family == "svd" else "eps")


@pytest.mark.parametrize(
    ("name", "family", "components"), [("diffusers_sd15", "sd1", SD), ("diffusers_sdxl_base", "sdxl", XL)]
)
def test_official_folders_are_identified(name, family, components):
    found = identify(official_folder(name))

    assert found.kind.value == "diffusers folder"
    assert found.family.value is family_named(family)
    assert set(found.components) == components
    assert (found.missing, found.unknown) == ({}, ())
    assert found.prediction == Fact("eps", found.prediction.evidence, "certain")
    assert found.size is not None and found.size.value == ((512, 512) if family == "sd1" else (1024, 1024))
    assert found.latent_scale is not None
    assert (found.latent_scale.value, found.latent_scale.sure) == (0.18215 if family == "sd1" else 0.13025, "certain")


@pytest.mark.parametrize("folder", ["diffusers_sd15", "diffusers_sdxl_base"])
def test_a_folder_and_its_single_file_give_the_same_specs_and_names(folder):
    name = {"diffusers_sd15": "sd15_emaonly", "diffusers_sdxl_base": "sdxl_base"}[folder]
    from_folder, from_file = identify(official_folder(folder)), identify(record(official(name)))

    for part in from_file.components:
        ours, theirs = from_folder.component(part), from_file.component(part)
        assert ours.origins.keys() == theirs.origins.keys()
        if part != "unet":
            assert ours.spec == theirs.spec
    unet = from_folder.component("unet").spec
    assert isinstance(unet, UNetSpec)
    assert replace(unet, heads=None, head_channels=None) == replace(
        from_file.component("unet").spec, heads=None, head_channels=None
    )


@pytest.mark.parametrize("name", ["vae_kl_f8_ft_mse", "vae_kl_f8_train_with_loss", "sdxl_vae"])
def test_an_autoencoder_alone_is_whole_and_of_no_certain_family(name):
    found = identify(record(official(name)))

    assert found.kind.value == "vae"
    assert found.family == Fact(None, found.family.evidence, "guess")
    assert found.component("vae").spec == VaeSpec()
    assert found.unknown == ()
    assert len(found.component("vae").origins) == 248
    assert len(found.leftovers) == len(official(name)) - 248


def test_the_name_of_an_autoencoders_file_may_hint_at_its_family():
    found = identify(record(official("sdxl_vae"), path=Path("/models/sdxl_vae.safetensors")))

    assert found.family.value is SDXL
    assert found.family.sure == "guess"
    assert found.latent_scale is not None and found.latent_scale.value == 0.13025


@pytest.mark.parametrize(
    ("name", "kind", "family"),
    [("lora_kohya_sd15", "lora", "sd1"), ("locon_kohya_sd15", "locon", "sd1"), ("lora_kohya_sdxl", "lora", "sdxl")],
)
def test_official_adapters_are_identified(name, kind, family):
    found = identify(record(official(name)))

    assert found.kind.value == kind
    assert found.family.value is family_named(family)
    assert found.components == {}
    assert found.prediction is None


def test_a_hypernetwork_is_identified():
    layers = manifest("a1111_hypernetwork")["examples"]["default_768"]
    tensors = {
        f"{width}.{side}.{key}": TensorInfo(tuple(shape), dtype)
        for width in (320, 640, 768, 1280)
        for side in (0, 1)
        for key, (shape, dtype) in layers.items()
    }

    found = identify(record(tensors, format="torch zip", extra={"layer_structure": [1, 2, 1], "step": 100}))

    assert found.kind.value == "hypernetwork"
    assert found.family.value is SD1


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        ({"string_to_param.*": (4, 768)}, "sd1"),
        ({"<cat>": (1024,)}, "sd2"),
        ({"emb_params": (4, 768)}, "sd1"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl"),
    ],
)
def test_embeddings_are_identified(tensors, family):
    found = identify(record(infos(tensors), extra={"string_to_token": {"*": 265}}))

    assert found.kind.value == "embedding"
    assert found.family.value is family_named(family)


def every_found():
    for name, *_ in CHECKPOINTS:
        yield identify(record(official(name)))
    for name in ("vae_kl_f8_ft_mse", "vae_kl_f8_train_with_loss", "lora_kohya_sdxl"):
        yield identify(record(official(name)))
    yield identify(official_folder("diffusers_sd15"))
    yield identify(record({}))


def test_every_statement_has_evidence_and_says_how_sure_it_is():
    for found in every_found():
        facts = [value for value in vars(found).values() if isinstance(value, Fact)]
        facts += [component.dtype for component in found.components.values()]
        assert len(facts) >= 3
        assert all(fact.evidence and fact.sure in ("certain", "likely", "guess") for fact in facts)
        assert all(component.evidence for component in found.components.values())
        assert all(found.leftovers.values())
        assert all(found.missing.values())


def accounted(found):
    """How often each tensor of the file is spoken of."""
    used = [source for c in found.components.values() for o in c.origins.values() for source in o.sources]
    return [*set(used), *found.leftovers, *found.unknown]


@pytest.mark.parametrize("name", [name for name, *_ in CHECKPOINTS] + ["vae_kl_f8_train_with_loss"])
def test_every_tensor_is_used_or_left_over_or_unknown_and_only_one_of_these(name):
    tensors = official(name)

    spoken = accounted(identify(record(tensors | {"some.other.weight": TensorInfo((3,), "F32")})))

    assert sorted(spoken) == sorted([*tensors, "some.other.weight"])


OFFICIAL = {name: official(name) for name in ("sd15_emaonly", "sd2_inpainting", "sdxl_base", "sdxl_refiner")}
# The tensors that each component needs. SD2 makes no use of its projection, and its folders do not have it.
NEEDED = {
    (name, part.name): sorted(
        {s for o in part.origins.values() for s in o.sources} - {"cond_stage_model.model.text_projection"}
    )
    for name, tensors in OFFICIAL.items()
    for part in identify(record(tensors)).components.values()
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_component_that_lacks_any_one_tensor_is_called_missing_and_no_other_is(data):
    name, part = data.draw(st.sampled_from(sorted(NEEDED)))
    gone = data.draw(st.sampled_from(NEEDED[name, part]))

    found = identify(record({key: info for key, info in OFFICIAL[name].items() if key != gone}))

    assert found.kind.value == "checkpoint"
    assert set(found.components) == {other for file, other in NEEDED if file == name} - {part}
    assert set(found.missing) == {part}
    assert "missing" in found.missing[part]
    with pytest.raises(ModelError, match=f"no usable {part}"):
        found.component(part)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(OFFICIAL)), st.booleans(), st.data())
def test_a_component_with_a_tensor_of_the_wrong_shape_or_name_is_called_missing(name, reshape, data):
    odd = data.draw(st.sampled_from(NEEDED[name, "unet"]))
    tensors = dict(OFFICIAL[name])
    info = tensors.pop(odd)
    if reshape:
        tensors[odd] = TensorInfo((*info.shape[:-1], info.shape[-1] + 1), info.dtype)
    else:
        tensors[odd + "_orig"] = info

    found = identify(record(tensors))

    assert set(found.missing) == {"unet"}


@pytest.mark.parametrize("part", sorted(XL))
def test_a_whole_component_that_is_gone_is_called_missing(part):
    prefix = next(place.prefix for place in SDXL.places if place.component == part)

    found = identify(record({k: v for k, v in official("sdxl_base").items() if not k.startswith(prefix)}))

    assert found.family.value is SDXL
    assert found.missing == {part: f"no tensor stands under {prefix}"}


def test_the_error_for_an_unusable_component_is_one_line_that_says_what_the_file_is():
    found = identify(record(official("lora_kohya_sd15")))

    with pytest.raises(ModelError) as error:
        found.component("unet")

    message = str(error.value)
    assert "\n" not in message
    for piece in ("/models/model.safetensors", "unet", "lora of Stable Diffusion 1"):
        assert piece in message


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
    assert (found.family.value, found.family.sure) == (family, "certain")
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
    assert set(found.missing) == {place.component for place in family.places} - {"unet"}


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


def test_the_oldest_sd1_files_lack_text_model_in_their_names():
    old = {key.replace("transformer.text_model.", "transformer."): i for key, i in official("sd15_emaonly").items()}

    found = identify(record(old))

    assert set(found.components) == SD
    assert found.component("text_encoder").origins.keys() == text_shapes(TextSpec()).keys()


def test_the_file_suffix_says_nothing():
    tensors = official("sd15_emaonly")

    found = {suffix: identify(record(tensors, path=Path(f"/models/model{suffix}"))) for suffix in (".ckpt", ".bin", "")}

    assert {f.kind.value for f in found.values()} == {"checkpoint"}
    assert {f.family.value for f in found.values()} == {SD1}


def test_averages_are_found_by_squeezing_the_known_names():
    tensors = official("sd15_pruned_full")

    found = identify(record(tensors))

    averages = {key for key in tensors if key.startswith("model_ema.")} - {"model_ema.decay", "model_ema.num_updates"}
    assert set(found.ema_names.values()) == averages
    assert all(
        tensors[average].shape == tensors[f"model.diffusion_model.{name}"].shape
        for name, average in found.ema_names.items()
    )


def test_averages_of_nothing_known_are_unknown():
    stray = {"model_ema.diffusion_modelinput_blocks99weight": TensorInfo((3,), "F32")}

    found = identify(record(official("sd15_pruned_full") | stray))

    assert found.unknown == tuple(stray)


def test_dtypes_are_told_for_each_component():
    half = {
        key: replace(info, dtype="F16") if key.startswith("model.diffusion_model.") else info
        for key, info in official("sd15_emaonly").items()
    }
    half["model.diffusion_model.out.2.bias"] = TensorInfo((4,), "F32")

    found = identify(record(half))

    assert found.component("vae").dtype.value == "F32"
    assert found.component("unet").dtype.value == "F16 + F32"
    assert found.component("unet").dtype.evidence == "685 tensors are F16, 1 tensors are F32"


def test_a_stated_family_overrides_and_what_speaks_against_it_is_said():
    found = identify(record(official("sd15_emaonly")), family="sd2", prediction="eps")

    assert found.family.value is SD2
    assert found.family.sure == "told"
    assert "exactly the shapes of Stable Diffusion 1" in found.family.evidence


def test_an_unknown_family_or_prediction_is_refused_with_the_choices():
    with pytest.raises(RequestError, match="sdxl-refiner"):
        identify(record({}), family="sd9")
    with pytest.raises(RequestError, match="eps, v, edm"):
        identify(record({}), prediction="x0")


def test_an_sd2_folder_ends_a_block_early_and_is_read_at_its_end():
    """diffusers stores 23 of the 24 blocks, so the block to read is the last there and the one before it in files."""
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


def test_a_second_encoder_of_sdxl_without_its_projection_is_not_whole():
    tensors = official("sdxl_base")
    del tensors["conditioner.embedders.1.model.text_projection"]

    assert "text_projection is missing" in identify(record(tensors)).missing["text_encoder_2"]


def test_fp8_scales_and_other_additions_are_unknown_but_do_not_hide_the_model():
    extra = {"model.diffusion_model.out.2.scale_weight": TensorInfo((), "F32"), "scaled_fp8": TensorInfo((0,), "F32")}

    found = identify(record(official("sd15_emaonly") | extra))

    assert set(found.components) == SD
    assert set(found.unknown) == set(extra)


@pytest.mark.parametrize(
    ("key", "kind", "word"),
    [
        ("controlnet", "controlnet", "ControlNet"),
        ("animatediff", "motion module", "AnimateDiff"),
        ("sd3", "unknown", "Stable Diffusion 3"),
        ("flux", "unknown", "Flux"),
        ("lumina2", "unknown", "diffusion transformer"),
        ("stable_cascade_stage_c", "unknown", "Stable Cascade"),
    ],
)
def test_the_telling_names_that_diffusers_lists_for_other_models_are_known(key, kind, word):
    names = CHECKPOINT_KEY_NAMES[key]

    found = identify(record(infos(dict.fromkeys([names] if isinstance(names, str) else names, (8, 8)))))

    assert found.kind.value == kind
    assert word in found.kind.evidence


def test_sd2s_own_upscaler_is_told_by_its_class_embedding():
    tensors = infos(unet_shapes(replace(SD2.unet, in_channels=7)), "model.diffusion_model.")

    found = identify(record(tensors | {"model.diffusion_model.label_emb.weight": TensorInfo((1000, 1280), "F32")}))

    assert found.kind.value == "upscaler"


def test_a_controlnet_is_told_for_its_family_by_the_prompts_it_attends_to():
    control = infos(unet_shapes(UNetSpec()), "control_model.")

    found = identify(record(control))

    assert (found.kind.value, found.family.value) == ("controlnet", SD1)


def test_what_nothing_is_known_of_is_unknown_and_no_error():
    for tensors in ({}, infos({"weight": (3, 3), "layer.bias": (3,)})):
        found = identify(record(tensors))

        assert found.kind.value == "unknown"
        assert found.family.value is None


def test_metadata_tells_the_size_that_a_fine_tune_was_trained_at():
    found = identify(record(official("sd15_emaonly"), metadata={"modelspec.resolution": "640x448"}))

    assert found.size is not None and found.size.value == (640, 448)


def test_identifying_imports_no_torch():
    code = "import sys, gouache.families.identify; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_families_of_the_catalog_agree_with_themselves():
    for family in FAMILIES:
        assert family_named(family.name) is family
        names = {place.component for place in family.places}
        if family.text is not None:
            assert {encoder.name for encoder in family.text.encoders} <= names
            assert family.text.pooled is None or family.text.pooled in names
