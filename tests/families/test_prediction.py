"""eps, v or edm, and the noise levels: each hint alone, their order, and the one weight that may be read."""

from __future__ import annotations

import pytest
import torch

from gouache.families.family import NoiseLevels
from gouache.families.identify import identify
from gouache.families.sd import SD2
from gouache.families.sdxl import SDXL
from gouache.files.record import TensorInfo
from gouache.nn.spec import UNetSpec

from .records import infos, narrow, official, official_folder, record

BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
EMPTY = TensorInfo((0,), "F32")


def bias_with_deviation(deviation, width=320):
    """A vector whose standard deviation is exactly `deviation`."""
    values = torch.linspace(-1, 1, width, dtype=torch.float64)
    return (values / values.std(correction=0) * deviation + 0.3).float()


def prediction(tensors, values=None, override=None, **rest):
    fact = identify(record(tensors, values, **rest), prediction=override).prediction
    assert fact is not None
    return fact


@pytest.mark.parametrize("name", ["sd21_768_v", "sd21_512_base"])
@pytest.mark.parametrize(("deviation", "expected"), [(0.12, "v"), (0.03, "eps")])
def test_without_other_hints_the_deviation_of_one_bias_decides_for_sd2(name, deviation, expected):
    found = prediction(official(name), {BIAS: bias_with_deviation(deviation)})

    assert (found.value, found.confidence) == (expected, "likely")
    assert BIAS in found.evidence
    assert f"{deviation:.3f}" in found.evidence


def test_the_default_size_of_v_prediction_models_of_sd2_is_768():
    v = identify(record(official("sd21_768_v"), {BIAS: bias_with_deviation(0.2)}))
    eps = identify(record(official("sd21_768_v"), {BIAS: bias_with_deviation(0.01)}))

    assert v.size is not None and v.size.value == (768, 768)
    assert eps.size is not None and eps.size.value == (512, 512)


def test_the_bias_gives_only_a_guess_for_a_network_of_other_widths():
    unet = UNetSpec(channels=64, heads=None, head_channels=64, context_dim=128, linear_projection=True)

    assert prediction(narrow(SD2, unet), {BIAS: bias_with_deviation(0.2, 64)}).confidence == "guess"


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        (["v_pred"], "v"),
        (["v_pred", "ztsnr"], "v"),
        (["edm_mean", "edm_std"], "edm"),
        (["edm_mean"], "eps"),
    ],
)
def test_marker_tensors_decide_the_prediction_and_are_not_unknown(markers, expected):
    found = identify(record(official("sdxl_base") | dict.fromkeys(markers, EMPTY)))

    assert found.prediction is not None and found.prediction.value == expected
    assert found.unknown == ()
    assert set(markers) <= set(found.leftovers)
    assert found.zero_snr is not None and found.zero_snr.value == ("ztsnr" in markers)


def test_continuous_noise_levels_are_read_from_their_markers():
    scalar = TensorInfo((), "F32")
    values = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.01)}

    found = identify(record(official("sdxl_base") | dict.fromkeys(values, scalar), values))

    assert found.prediction is not None and found.prediction.value == "v"
    assert found.levels is not None
    assert (found.levels.value.kind, found.levels.value.high) == ("edm", 120.0)
    assert found.levels.value.low == pytest.approx(0.01)


def test_without_markers_the_noise_levels_are_those_of_the_family():
    levels = {name: identify(record(official(name))).levels for name in ("sd15_emaonly", "sdxl_base", "svd")}

    assert (
        levels["sd15_emaonly"].value == levels["sdxl_base"].value == NoiseLevels("scaled_linear", 0.00085, 0.012, 1000)
    )
    assert levels["svd"].value == NoiseLevels("edm", 0.002, 700.0)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "eps"),
        ({"modelspec.predict_key": "v"}, "v"),
        ({"ss_v_parameterization": "True"}, "v"),
    ],
)
def test_metadata_decides_the_prediction_with_certainty(metadata, expected):
    found = prediction(official("sdxl_base"), metadata=metadata)

    assert (found.value, found.confidence) == (expected, "certain")
    assert next(iter(metadata)) in found.evidence


def test_metadata_with_an_unknown_value_is_ignored():
    found = prediction(official("sdxl_base"), metadata={"modelspec.prediction_type": "\x1b[31mwild"})

    assert (found.value, found.confidence) == ("eps", "likely")


def test_the_architecture_in_the_metadata_of_the_released_768_model_is_a_hint():
    found = prediction(official("sd21_768_v"), metadata={"modelspec.architecture": "stable-diffusion-v2-768-v"})

    assert found.value == "v"


@pytest.mark.parametrize(("word", "expected"), [("v_prediction", "v"), ("epsilon", "eps")])
def test_a_folders_scheduler_decides_the_prediction_and_zero_snr(word, expected):
    folder = official_folder("diffusers_sdxl_base")
    scheduler = {"prediction_type": word, "rescale_betas_zero_snr": expected == "v"}

    found = identify(
        record(
            folder.tensors,
            format="diffusers folder",
            extra={**folder.extra, "scheduler/scheduler_config.json": scheduler},
        )
    )

    assert found.prediction is not None and (found.prediction.value, found.prediction.confidence) == (
        expected,
        "certain",
    )
    assert found.zero_snr is not None and (found.zero_snr.value, found.zero_snr.confidence) == (
        expected == "v",
        "certain",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v"),
        ("model:\n  params:\n    parameterization: eps\n", "eps"),
        ("model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n", "eps"),
        (
            "          scaling_config:\n            target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n",
            "v",
        ),
        ("            target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n", "eps"),
    ],
)
def test_the_original_configuration_in_the_folder_of_the_file_decides_the_prediction(tmp_path, text, expected):
    (tmp_path / "model.v2.yaml").write_text(text)

    found = prediction(official("sd21_768_v"), path=tmp_path / "model.v2.safetensors")

    assert (found.value, found.confidence) == (expected, "certain")
    assert "model.v2.yaml" in found.evidence


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00" * 50_000, b"unrelated: true\n"])
def test_a_configuration_without_relevant_settings_is_ignored(tmp_path, content):
    (tmp_path / "model.yaml").write_bytes(content)

    found = prediction(official("sd21_768_v"), {BIAS: bias_with_deviation(0.2)}, path=tmp_path / "model.ckpt")

    assert BIAS in found.evidence


@pytest.mark.parametrize(("step", "expected"), [(875000, "eps"), (220000, "eps"), (110000, "v")])
def test_the_training_step_of_the_released_pickles_decides_for_sd2(step, expected):
    found = prediction(official("sd21_768_v"), extra={"global_step": step})

    assert (found.value, found.confidence) == (expected, "likely")
    assert str(step) in found.evidence


def test_the_training_step_is_ignored_for_other_families():
    assert prediction(official("sd15_emaonly"), extra={"global_step": 110000}).value == "eps"


@pytest.mark.parametrize("name", ["sd2_inpainting", "sd2_depth"])
def test_variants_of_sd2_predict_noise_and_no_weight_is_read(name):
    assert prediction(official(name)).value == "eps"


def test_an_override_wins_over_all_hints_and_contradicting_ones_are_listed():
    found = prediction(official("sdxl_base") | {"v_pred": EMPTY}, override="eps")

    assert (found.value, found.confidence) == ("eps", "override")
    assert "contradicted by: the file has the marker tensor v_pred" in found.evidence


def test_with_an_override_the_bias_is_not_read():
    assert prediction(official("sd21_768_v"), override="v").confidence == "override"


def test_markers_are_stronger_than_metadata_and_contradicting_hints_are_listed():
    found = prediction(official("sdxl_base") | {"v_pred": EMPTY}, metadata={"modelspec.prediction_type": "epsilon"})

    assert found.value == "v"
    assert "contradicted by" in found.evidence and "modelspec.prediction_type" in found.evidence


def test_hints_that_agree_are_not_listed_as_contradictions():
    found = prediction(official("sdxl_base") | {"v_pred": EMPTY}, metadata={"modelspec.prediction_type": "v"})

    assert "contradicted" not in found.evidence


def test_a_unet_alone_has_a_prediction_but_an_adapter_has_none():
    tensors = {k: v for k, v in official("sdxl_base").items() if k.startswith("model.diffusion_model.")}

    assert prediction(tensors | {"v_pred": EMPTY}).value == "v"
    assert identify(record(infos({"clip_l": (1, 768), "clip_g": (1, 1280)}))).prediction is None
    assert identify(record(tensors)).family.value is SDXL
