"""Identification of every official key list from names, shapes and metadata only, and of other kinds of files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

from gouache.errors import ModelError, RequestError
from gouache.families.catalog import FAMILIES, family_named
from gouache.families.components import PREFIXES
from gouache.families.found import Fact
from gouache.families.identify import identify
from gouache.families.sd import SD1, SD2
from gouache.families.sdxl import SDXL
from gouache.files.record import TensorInfo
from gouache.nn.spec import UNetSpec, VaeSpec

from .records import infos, manifest, official, official_folder, record

SD = {"unet", "vae", "text_encoder"}
XL = SD | {"text_encoder_2"}
VIDEO = {"unet", "vae", "image_encoder", "frame_vae"}

# name, kind, family, variant, components, EMA, as documented for the key lists and the released models
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
    assert (found.family.value.name, found.family.confidence) == (family, "certain")
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
    assert (found.latent_scale.value, found.latent_scale.confidence) == (
        0.18215 if family == "sd1" else 0.13025,
        "certain",
    )


def test_a_diffusers_folder_of_a_video_model_is_recognised():
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(block_out_channels=(32, 64, 64, 64), num_attention_heads=(1, 2, 2, 2))
        vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",))
    tensors = {
        f"{part}/{name}": TensorInfo(tuple(tensor.shape), "F32")
        for part, model in (("unet", unet), ("vae", vae))
        for name, tensor in model.state_dict().items()
    }

    found = identify(record(tensors, format="diffusers folder"))

    assert found.family.value is family_named("svd")
    assert set(found.components) == {"unet", "vae"}
    assert found.component("unet").spec is None
    assert found.unknown == ()


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
def test_an_autoencoder_alone_is_complete_and_its_family_is_not_certain(name):
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
    assert found.family.confidence == "guess"
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


def test_a_lora_of_sd2_is_distinguished_from_sd1_by_its_context_width():
    wider = {
        name: replace(info, shape=(8, 1024)) if name.endswith("attn2_to_k.lora_down.weight") else info
        for name, info in official("lora_kohya_sd15").items()
    }

    assert identify(record(wider)).family.value is SD2


def test_the_family_of_a_lora_for_the_text_encoder_only_is_read_from_its_metadata():
    text = {name: info for name, info in official("lora_kohya_sd15").items() if name.startswith("lora_te_")}

    assert identify(record(text)).family.value is None
    assert identify(record(text)).family.evidence == "not recognised (no tensor shows a context width)"
    assert identify(record(text, metadata={"ss_base_model_version": "sd_v1"})).family.value is SD1


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


@pytest.mark.parametrize(
    ("tensors", "evidence"),
    [
        (
            {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 128)},
            "not recognised (context width 128 matches no released model)",
        ),
        (
            {f"128.{side}.linear.0.weight": (256, 128) for side in (0, 1)},
            "not recognised (context width 128 matches no released model)",
        ),
        (
            {"clip_l": (1, 64), "clip_g": (1, 128)},
            "not recognised (vector width 64 + 128 matches no released model)",
        ),
    ],
    ids=["LoRA", "hypernetwork", "embedding"],
)
def test_the_context_width_of_an_unknown_family_is_reported(tensors, evidence):
    family = identify(record(infos(tensors))).family

    assert (family.value, family.evidence) == (None, evidence)


def every_found():
    for name, *_ in CHECKPOINTS:
        yield identify(record(official(name)))
    for name in ("vae_kl_f8_ft_mse", "vae_kl_f8_train_with_loss", "lora_kohya_sdxl"):
        yield identify(record(official(name)))
    yield identify(official_folder("diffusers_sd15"))
    yield identify(record({}))


def test_every_statement_has_evidence_and_a_confidence():
    for found in every_found():
        facts = [value for value in vars(found).values() if isinstance(value, Fact)]
        facts += [component.dtype for component in found.components.values()]
        assert len(facts) >= 3
        assert all(fact.evidence and fact.confidence in ("certain", "likely", "guess") for fact in facts)
        assert all(component.evidence for component in found.components.values())
        assert all(found.leftovers.values())
        assert all(found.missing.values())


def accounted(found):
    """All tensor names that the result mentions, each as often as it is mentioned."""
    used = [source for c in found.components.values() for o in c.origins.values() for source in o.sources]
    return [*set(used), *found.leftovers, *found.unknown]


@pytest.mark.parametrize("name", [name for name, *_ in CHECKPOINTS] + ["vae_kl_f8_train_with_loss"])
def test_every_tensor_is_exactly_one_of_used_leftover_and_unknown(name):
    tensors = official(name)

    mentioned = accounted(identify(record(tensors | {"some.other.weight": TensorInfo((3,), "F32")})))

    assert sorted(mentioned) == sorted([*tensors, "some.other.weight"])


def test_the_error_for_an_unusable_component_is_one_line_that_states_what_the_file_is():
    found = identify(record(official("lora_kohya_sd15")))

    with pytest.raises(ModelError) as error:
        found.component("unet")

    message = str(error.value)
    assert "\n" not in message
    for piece in ("/models/model.safetensors", "unet", "lora of Stable Diffusion 1"):
        assert piece in message


def test_the_file_suffix_is_ignored():
    tensors = official("sd15_emaonly")

    found = {suffix: identify(record(tensors, path=Path(f"/models/model{suffix}"))) for suffix in (".ckpt", ".bin", "")}

    assert {f.kind.value for f in found.values()} == {"checkpoint"}
    assert {f.family.value for f in found.values()} == {SD1}


def test_a_family_set_by_the_caller_overrides_and_contradicting_hints_are_listed():
    found = identify(record(official("sd15_emaonly")), family="sd2", prediction="eps")

    assert found.family.value is SD2
    assert found.family.confidence == "override"
    assert "exactly the shapes of Stable Diffusion 1" in found.family.evidence


def test_an_unknown_family_or_prediction_is_refused_with_the_choices():
    with pytest.raises(RequestError, match="sdxl-refiner"):
        identify(record({}), family="sd9")
    with pytest.raises(RequestError, match="eps, v, edm"):
        identify(record({}), prediction="x0")


def test_unknown_tensors_inside_and_outside_the_parts_are_told_apart():
    inside, outside = "model.diffusion_model.out.2.scale_weight", "safety_checker.concept_embeds"
    extra = {inside: TensorInfo((), "F32"), outside: TensorInfo((17,), "F32"), "padding": TensorInfo((0,), "F32")}

    found = identify(record(official("sd15_emaonly") | extra))

    assert set(found.components) == SD
    assert set(found.unknown) == {inside, outside}
    assert found.outside == {outside}
    assert found.leftovers["padding"] == "an empty tensor"


def test_the_training_size_of_a_fine_tune_is_read_from_metadata():
    found = identify(record(official("sd15_emaonly"), metadata={"modelspec.resolution": "640x448"}))

    assert found.size is not None and found.size.value == (640, 448)


def test_identify_does_not_import_torch():
    code = "import sys, gouache.families.identify; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_component_prefix_begins_with_another():
    assert not [(a, b) for a in PREFIXES for b in PREFIXES if a != b and a.startswith(b)]


def test_the_families_of_the_catalog_are_consistent():
    for family in FAMILIES:
        assert family_named(family.name) is family
        names = {location.component for location in family.locations}
        if family.text is not None:
            assert {encoder.name for encoder in family.text.encoders} <= names
            assert family.text.pooled is None or family.text.pooled in names
