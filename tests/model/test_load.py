"""Loading: weights mapped where possible, in one dtype, the same picture from every form of a file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gouache
from gouache import Model
from gouache.app.settings import Settings
from gouache.workshop.convert import convert
from tests.nn.narrow import normal
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
Models = Callable[[str], Model]


def networks(model: Model) -> list[nn.Module]:
    return [model.unet, model.vae, *model.text_encoders.values()]


def weights(model: Model) -> Iterator[Tensor]:
    for network in networks(model):
        yield from network.parameters()
        yield from network.buffers()


def picture(model: Model) -> np.ndarray:
    options: dict[str, Any] = {"steps": 2, "seed": 3, "size": (64, 64), "negative": "dog"}
    return np.asarray(next(model.paint("a cat", **options)).image, np.int16)


def assert_same(model: Model, other: Model) -> None:
    """Bit-equal weights; the picture may round differently, since weights are aligned differently in memory."""
    for ours, theirs in zip(networks(model), networks(other)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert np.abs(picture(model) - picture(other)).max() <= 1


def mixed_dtypes(tensors: dict[str, Tensor]) -> None:
    for index, (name, tensor) in enumerate(tensors.items()):
        tensors[name] = tensor.to((torch.float16, torch.bfloat16, torch.float32, torch.float64)[index % 4])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_weight_has_the_requested_dtype_and_none_is_on_meta(
    family: str, dtype: str, narrow: Narrows, settings: Settings, tmp_path: Path
):
    file = altered(narrow(family).file, tmp_path / "mixed.safetensors", mixed_dtypes)

    model = gouache.load(file, dtype=dtype, settings=settings)

    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {(weight.dtype, weight.device.type) for weight in weights(model)} == {(expected, "cpu")}
    assert not any(weight.requires_grad for weight in weights(model))
    assert not any(network.training for network in networks(model))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_weights_in_the_dtype_of_the_file_stay_mapped(family: str, narrow: Narrows, settings: Settings):
    """OpenCLIP's fused and transposed tensors too: they are split as views. The VAE is copied, to channels-last."""
    file = narrow(family).file

    model = gouache.load(file, settings=settings)

    mapped = list[range]()
    for entry in Path("/proc/self/maps").read_text().splitlines():
        if entry.endswith(str(file)):
            begin, end = entry.split()[0].split("-")
            mapped.append(range(int(begin, 16), int(end, 16)))
    found = [weight for network in (model.unet, *model.text_encoders.values()) for weight in network.parameters()]
    assert mapped and found
    assert all(any(weight.data_ptr() in each for each in mapped) for weight in found)


@pytest.mark.parametrize("zip_form", [True, False], ids=["zip", "legacy"])
def test_a_ckpt_gives_the_picture_of_its_safetensors(
    zip_form: bool, narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path
):
    path = tmp_path / "model.ckpt"
    content = {"state_dict": load_file(narrow("sd1").file), "global_step": 470000, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zip_form)

    model = gouache.load(path, settings=settings)

    assert model.file.format == ("torch zip" if zip_form else "torch legacy")
    assert_same(model, loaded("sd1"))


def test_other_tensors_of_released_files_change_nothing(
    narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path
):
    def add_others(tensors: dict[str, Tensor]) -> None:
        positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        tensors[positions] = torch.arange(77)[None].half() * 1.01  # damaged by merging in many files
        tensors["betas"] = torch.full((1000,), torch.nan)
        tensors["alphas_cumprod"] = torch.zeros(1000)
        tensors["model_ema.decay"], tensors["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(470000)

    file = altered(narrow("sd1").file, tmp_path / "others.safetensors", add_others)

    assert_same(gouache.load(file, settings=settings), loaded("sd1"))


def test_the_last_block_of_the_text_encoder_of_sd2_is_not_used(
    narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path
):
    """Single files have 24 blocks, of which the 23rd gives the context; folders have 23."""

    def add_last_block(tensors: dict[str, Tensor]) -> None:
        blocks = "cond_stage_model.model.transformer.resblocks."
        for name in [name for name in tensors if name.startswith(blocks + "22.")]:
            tensors[name.replace(".22.", ".23.")] = normal(*tensors[name].shape)
        tensors["cond_stage_model.model.text_projection"] = normal(64, 64)
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)

    file = altered(narrow("sd2").file, tmp_path / "model.safetensors", add_last_block)

    model = gouache.load(file, settings=settings)

    assert len(model.text_encoders["text_encoder"].text_model.encoder.layers) == 24
    assert np.abs(picture(model) - picture(loaded("sd2"))).max() <= 1


def test_old_names_of_the_text_encoder_are_read(narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path):
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "transformer.text_model." in name]:
            tensors[name.replace("text_model.", "")] = tensors.pop(name)

    file = altered(narrow("sd1").file, tmp_path / "old.safetensors", rename)

    assert_same(gouache.load(file, settings=settings), loaded("sd1"))


def test_the_prediction_can_be_overridden(narrow: Narrows, loaded: Models, settings: Settings):
    overridden = gouache.load(narrow("sd1").file, prediction="v", settings=settings)

    assert (overridden.prediction, loaded("sd1").prediction) == ("v", "eps")
    assert np.abs(picture(overridden) - picture(loaded("sd1"))).max() > 1


def test_a_v_prediction_model_is_identified_as_a_folder_and_as_a_file(
    narrow: Narrows, loaded: Models, settings: Settings
):
    folder = gouache.load(narrow("sd2").folder, settings=settings)

    assert folder.prediction == loaded("sd2").prediction == "v"


def test_zero_snr_is_kept_in_the_single_file(narrow: Narrows, settings: Settings, tmp_path: Path):
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    shutil.copytree(narrow("sd2").folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    convert(folder, file)

    models = [gouache.load(path, settings=settings) for path in (folder, file)]

    assert all(model.schedule.sigma_max > 4000 for model in models)


def test_the_default_size_is_kept_in_the_single_file(narrow: Narrows, loaded: Models, settings: Settings):
    """The folder's U-Net states a latent of 8x8, which is 64x64 pixels."""
    folder = gouache.load(narrow("sd1").folder, settings=settings)

    assert folder.size == loaded("sd1").size == (64, 64)
    assert next(loaded("sd1").paint("a cat", steps=1, seed=0)).image.size == (64, 64)


# ---- files of odd origin: each of these functions changes names or forms of the tensors, not the model

UNET = "model.diffusion_model."


def strays(tensors: dict[str, Tensor]) -> None:
    for name in (
        "safety_checker.concept_embeds", "denoiser.log_sigmas", "embedding_manager.string_to_param_dict.*",
        "first_stage_model.logvar", "conditioner.embedders.1.logit_scale", "cond_stage_model.logit_scale",
        "cond_stage_model.clip_l.transformer.text_model.embeddings.position_ids", "junk.tensor", "ddim_sigmas",
    ):  # fmt: skip
        tensors[name] = torch.ones(3)
    tensors |= {"global_step": torch.tensor(7), "epoch": torch.tensor(1), "padding": torch.empty(0)}
    tensors[UNET + "padding"] = torch.empty(0)


def as_forge_saves(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
        tensors[name.replace("cond_stage_model.", "text_encoders.clip_l.")] = tensors.pop(name)
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)


def _vae_attention(names: dict[str, str], linear: bool) -> Callable[[dict[str, Tensor]], None]:
    def alter(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".mid.attn_1." in name and ".norm." not in name]:
            tensor = tensors.pop(name)
            stem, layer, leaf = name.rsplit(".", 2)
            tensor = tensor[..., 0, 0] if linear and leaf == "weight" else tensor
            tensors[f"{stem}.{names[layer]}.{leaf}"] = tensor

    return alter


def _named(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def alter(tensors: dict[str, Tensor]) -> None:
        renamed = {change(name): tensors.pop(name) for name in list(tensors)}
        tensors.update(renamed)

    return alter


NEW = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
TWICE = {"q": "to_to_q", "k": "to_to_k", "v": "to_to_v", "proj_out": "to_out.0"}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
PLAIN = {name: name for name in NEW}
ODD: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "strays": strays,
    "forge": as_forge_saves,
    "vae to_q": _vae_attention(NEW, False),
    "vae to_q linear": _vae_attention(NEW, True),
    "vae to_to_q": _vae_attention(TWICE, True),
    "vae query": _vae_attention(OLD, True),
    "vae linear": _vae_attention(PLAIN, True),
    "module": _named(lambda name: f"module.{name}"),
    "compiled": _named(lambda name: f"_orig_mod.{name}"),
    "compiled inside": _named(lambda name: name.replace("diffusion_model.", "diffusion_model._orig_mod.")),
    "wrapped twice": _named(lambda name: f"state_dict.module.{name}"),
    "averages only": _named(
        lambda name: "model_ema." + name[6:].replace(".", "") if name.startswith("model.diffusion_model.") else name
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_give_the_same_model(odd: str, narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path):
    model = gouache.load(altered(narrow("sd1").file, tmp_path / "odd.safetensors", ODD[odd]), settings=settings)

    for ours, theirs in zip(networks(model), networks(loaded("sd1"))):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("part", ["embeddings.position_ids", "transformer.text_model.embeddings.position_ids"])
def test_position_ids_in_the_second_encoder_of_sdxl_change_nothing(
    part: str, narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path
):
    def alter(tensors: dict[str, Tensor]) -> None:
        tensors["conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]

    model = gouache.load(altered(narrow("sdxl").file, tmp_path / "odd.safetensors", alter), settings=settings)

    for ours, theirs in zip(networks(model), networks(loaded("sdxl"))):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize(
    "wrap",
    [lambda s: {"model": s}, lambda s: {"module": s}, lambda s: {"state_dict": {"state_dict": s}}, lambda s: [s],
     lambda s: (s, 5), lambda s: {"state_dict": {"module": s}, "step": 3}, lambda s: {"model": s, "epoch": 3}],
    ids=["model", "module", "doubled", "list", "tuple", "both", "with a number"],
)  # fmt: skip
def test_a_model_inside_dictionaries_or_lists_is_the_same_model(
    wrap: Callable[[dict[str, Tensor]], Any], narrow: Narrows, loaded: Models, settings: Settings, tmp_path: Path
):
    torch.save(wrap(load_file(narrow("sd1").file)), tmp_path / "wrapped.ckpt")

    model = gouache.load(tmp_path / "wrapped.ckpt", settings=settings)

    for ours, theirs in zip(networks(model), networks(loaded("sd1"))):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_an_unknown_tensor_inside_a_part_is_still_refused(narrow: Narrows, settings: Settings, tmp_path: Path):
    def alter(tensors: dict[str, Tensor]) -> None:
        tensors[UNET + "extra.weight"] = torch.ones(3)

    with pytest.raises(gouache.errors.ModelError, match=r"extra\.weight.*gouache prune"):
        gouache.load(altered(narrow("sd1").file, tmp_path / "odd.safetensors", alter), settings=settings)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "rows", "rows and ones", "blocks"])
def test_scaled_fp8_is_read_with_its_scales(
    form: str, dtype: torch.dtype, narrow: Narrows, settings: Settings, tmp_path: Path
):
    expected: dict[str, Tensor] = {}

    def alter(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(UNET) and tensors[name].ndim == 2]:
            weight = tensors[name].float()
            rows, columns = weight.shape
            scale = (weight.abs().max() / 448).expand(rows, columns).clone()
            if form != "scale_weight" and form != "weight_scale":
                scale = torch.linspace(1, 2, rows)[:, None].mul(scale)
            if form == "blocks":
                scale = scale[:1, :1].expand(rows, columns).clone()
                scale[32:] *= 2
                scale[:, 32:] *= 3
            codes = (weight / scale).to(dtype)
            expected[name] = codes.float() * scale
            tensors[name] = codes
            stem = name.removesuffix("weight")
            if form == "scale_weight":
                tensors[stem + "scale_weight"], tensors[stem + "scale_input"] = scale[0, 0].clone(), torch.ones(())
            elif form == "blocks":
                tensors[stem + "weight_scale_inv"] = scale[::32, ::32].clone()
            else:
                stored = {"weight_scale": scale[0, 0], "rows": scale[:, 0], "rows and ones": scale[:, :1]}[form]
                tensors[stem + "weight_scale"] = stored.clone()
        if form == "scale_weight":
            tensors[UNET + "scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)

    model = gouache.load(altered(narrow("sd1").file, tmp_path / "fp8.safetensors", alter), settings=settings)

    found = dict(model.unet.named_parameters())
    assert len(expected) > 50
    for name, weight in expected.items():
        torch.testing.assert_close(found[name.removeprefix(UNET)].data, weight, rtol=1e-6, atol=0)
    assert any("scaled fp8" in note for note in model.file.notes)


def test_a_scale_of_another_shape_is_named(narrow: Narrows, settings: Settings, tmp_path: Path):
    def alter(tensors: dict[str, Tensor]) -> None:
        name = UNET + "time_embed.0.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[UNET + "time_embed.0.scale_weight"] = torch.ones(5)

    with pytest.raises(gouache.errors.DamagedFile, match="one number, or one per row or block"):
        gouache.load(altered(narrow("sd1").file, tmp_path / "fp8.safetensors", alter), settings=settings)
