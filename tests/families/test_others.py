"""Files that are not Stable Diffusion models, and files with nothing known in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.families.identify import identify
from gouache.families.sd import SD1, SD2
from gouache.files.record import TensorInfo
from gouache.layouts.original import unet_shapes
from gouache.nn.spec import UNetSpec

from .records import infos, official, record

PIECES = sorted(
    {piece for name in ("sd15_emaonly", "sd21_768_v") for key in official(name) for piece in key.split(".")}
)


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
def test_characteristic_names_of_other_models_in_diffusers_are_recognised(key, kind, word):
    names = CHECKPOINT_KEY_NAMES[key]

    found = identify(record(infos(dict.fromkeys([names] if isinstance(names, str) else names, (8, 8)))))

    assert found.kind.value == kind
    assert word in found.kind.evidence


def test_the_sd2_upscaler_is_recognised_by_its_class_embedding():
    tensors = infos(unet_shapes(replace(SD2.unet, in_channels=7)), "model.diffusion_model.")

    found = identify(record(tensors | {"model.diffusion_model.label_emb.weight": TensorInfo((1000, 1280), "F32")}))

    assert found.kind.value == "upscaler"


def test_the_family_of_a_controlnet_is_recognised_by_its_context_width():
    control = infos(unet_shapes(UNetSpec()), "control_model.")

    found = identify(record(control))

    assert (found.kind.value, found.family.value) == ("controlnet", SD1)


def test_a_file_without_known_names_is_unknown_and_not_an_error():
    for tensors in ({}, infos({"weight": (3, 3), "layer.bias": (3,)})):
        found = identify(record(tensors))

        assert found.kind.value == "unknown"
        assert found.family.value is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_arbitrary_names_and_shapes_never_raise(data):
    pieces = st.sampled_from(PIECES)
    name = st.lists(pieces, min_size=1, max_size=6).map(".".join)
    prefix = st.sampled_from(["", "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.", "unet/"])
    shape = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    known = st.sampled_from(["input_blocks.0.0.weight", "out.2.weight", "conv_in.weight", "token_embedding.weight"])
    names = data.draw(st.lists(st.tuples(prefix, name | known), max_size=12))
    tensors = infos({head + tail: data.draw(shape) for head, tail in names})

    found = identify(record(tensors, extra={"unet/config.json": {"sample_size": -1}, "global_step": "x"}))

    assert found.kind.evidence


def test_a_file_with_absurd_numbers_in_its_names_is_handled_quickly():
    hostile = {f"down_blocks.{10**12}.resnets.{10**12}.norm1.weight": (1,)}
    hostile |= {f"input_blocks.{i}.{i}.transformer_blocks.{j}.x": (1, 1, 1, 1) for i in range(99) for j in range(99)}
    hostile |= {f"down_blocks.{i}.resnets.{i}.norm1.weight": (1,) for i in range(2000)} | {"conv_in." * 9999: (1,)}

    found = identify(record(infos(hostile)))

    assert found.components == {}
