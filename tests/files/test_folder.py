"""Models in several files: folders saved by diffusers and transformers are opened with every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gouache.errors import DamagedFile, FileError, NotAModel, RequestError
from gouache.files.open import open_model

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}
OTHERS = {"b.weight": torch.ones(4, dtype=torch.float16)}


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)


def pipeline(folder: Path, **components: Any) -> Path:
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **components})
    return folder


def test_a_pipeline_saved_by_diffusers_is_opened_completely(tmp_path: Path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    vae.half().save_pretrained(tmp_path / "vae", safe_serialization=False, variant="fp16")
    write_json(tmp_path / "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"})
    pipeline(tmp_path, unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
             scheduler=["diffusers", "DDIMScheduler"], safety_checker=[None, None])  # fmt: skip
    expected = {f"unet/{name}": tensor for name, tensor in unet.state_dict().items()}
    expected |= {f"vae/{name}": tensor for name, tensor in vae.state_dict().items()}

    file = open_model(tmp_path)

    assert file.format == "diffusers folder"
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    assert set(file) == set(expected)
    assert all(file.tensor(name).equal(tensor) for name, tensor in expected.items())
    assert file.extra["unet/config.json"]["cross_attention_dim"] == 32
    assert file.extra["scheduler/scheduler_config.json"]["prediction_type"] == "v_prediction"
    assert file.notes == ("vae: uses the fp16 weights: it has no plain ones",)
    assert len(file.files) == len(set(file.files)) and all(path.is_file() for path in file.files)


def test_weights_are_chosen_in_a_fixed_order_of_preference(tmp_path: Path):
    config, base = {"_class_name": "X"}, "diffusion_pytorch_model"
    order = [f"{base}.safetensors", f"{base}.bin", f"{base}.fp16.safetensors", f"{base}.fp16.bin"]
    write_json(tmp_path / "config.json", config)
    for name in order:
        write_weights(tmp_path / name, {name: torch.zeros(1)})

    taken = []
    for name in order:
        taken += list(open_model(tmp_path))
        (tmp_path / name).unlink()

    assert taken == order


def test_a_variant_is_used_if_the_component_has_it(tmp_path: Path):
    pipeline(tmp_path, unet=["diffusers", "U"], vae=["diffusers", "V"])
    write_weights(tmp_path / "unet/diffusion_pytorch_model.safetensors", WEIGHTS)
    write_weights(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors", OTHERS)
    write_weights(tmp_path / "vae/diffusion_pytorch_model.safetensors", WEIGHTS)

    plain, half = open_model(tmp_path), open_model(tmp_path, variant="fp16")

    assert {name for name in plain if name.startswith("unet")} == {f"unet/{name}" for name in WEIGHTS}
    assert {name for name in half if name.startswith("unet")} == {f"unet/{name}" for name in OTHERS}
    assert {name for name in half if name.startswith("vae")} == {f"vae/{name}" for name in WEIGHTS}
    assert plain.notes == ()
    assert half.notes == ("vae: uses the plain weights: it has no fp16 ones",)


@pytest.mark.parametrize("alone", [True, False])
def test_a_variant_that_no_component_has_is_an_error(tmp_path: Path, alone: bool):
    component = tmp_path if alone else pipeline(tmp_path, unet=["diffusers", "U"]) / "unet"
    write_weights(component / "diffusion_pytorch_model.safetensors", WEIGHTS)

    with pytest.raises(FileError, match="no weights of the variant 'bf16'"):
        open_model(tmp_path, variant="bf16")


def test_a_variant_with_a_path_in_it_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="variant"):
        open_model(tmp_path, variant="../../etc")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin"])
def test_tensors_of_a_single_component_keep_their_names(tmp_path: Path, name: str):
    write_json(tmp_path / "config.json", {"architectures": ["CLIPTextModel"], "hidden_size": 768})
    write_weights(tmp_path / name, WEIGHTS)

    file = open_model(tmp_path)

    assert (file.format, set(file)) == ("component folder", set(WEIGHTS))
    assert file.extra == {"config.json": {"architectures": ["CLIPTextModel"], "hidden_size": 768}}
    assert file.tensor("a.weight").equal(WEIGHTS["a.weight"])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_opened_as_one_model(tmp_path: Path, kind: str):
    write_weights(tmp_path / f"model-00001-of-00002.{kind}", WEIGHTS)
    write_weights(tmp_path / f"model-00002-of-00002.{kind}", OTHERS)
    where = dict.fromkeys(WEIGHTS, f"model-00001-of-00002.{kind}")
    where |= dict.fromkeys(OTHERS, f"model-00002-of-00002.{kind}")
    index = tmp_path / f"model.{kind}.index.json"
    write_json(index, {"metadata": {"total_size": 40}, "weight_map": where})

    for path in (index, tmp_path):
        file = open_model(path)
        assert {name: file.tensor(name).tolist() for name in file} == {
            name: tensor.tolist() for name, tensor in (WEIGHTS | OTHERS).items()
        }
        assert file.nbytes == 40


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"a.weight": "gone.safetensors"}, FileError, "does not exist"),
        ({"a.weight": "one.safetensors", "missing": "one.safetensors"}, DamagedFile, "'missing' is not in"),
        ({"a.weight": "../one.safetensors"}, DamagedFile, "plain file name"),
        ({"a.weight": "/etc/passwd"}, DamagedFile, "plain file name"),
        ({"a.weight": "one.safetensors", "a.bias": "two.safetensors"}, DamagedFile, "in two shards"),
        ({"a.weight": 3}, DamagedFile, "not in 3"),
        ({}, NotAModel, "weight_map"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path: Path, where: dict[str, Any], error: type[FileError], message: str):
    write_weights(tmp_path / "one.safetensors", WEIGHTS)
    write_weights(tmp_path / "two.safetensors", WEIGHTS)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": where})

    with pytest.raises(error, match=message):
        open_model(tmp_path / "model.safetensors.index.json")


def test_tensors_that_are_not_in_the_index_are_read_and_noted(tmp_path: Path):
    write_weights(tmp_path / "one.safetensors", WEIGHTS)
    write_json(tmp_path / "m.safetensors.index.json", {"weight_map": {"a.bias": "one.safetensors"}})

    file = open_model(tmp_path / "m.safetensors.index.json")

    assert set(file) == set(WEIGHTS)
    assert file.notes[0] == "1 tensor is in its shards but not in its index"


def test_component_names_that_are_paths_are_refused(tmp_path: Path):
    pipeline(tmp_path, **{"../../etc": ["diffusers", "X"]})

    with pytest.raises(DamagedFile, match="plain folder name"):
        open_model(tmp_path)


def test_a_component_whose_folder_is_missing_is_noted(tmp_path: Path):
    pipeline(tmp_path, unet=["diffusers", "U"], vae=["diffusers", "V"])
    write_weights(tmp_path / "unet/diffusion_pytorch_model.safetensors", WEIGHTS)

    assert open_model(tmp_path).notes == ("the component vae is listed, but its folder is missing",)


@pytest.mark.parametrize(
    ("document", "message"),
    [("{not json", "not valid JSON"), ("[1, 2]", "does not list"), ('{"unet": ["a", "b"]}', "without weights"),
     ("[" * 100_000, "not valid JSON"), ("[" + "0," * 3_000_000 + "0]", "6 MB")],
    ids=["broken", "list", "no folders", "deep", "long"],
)  # fmt: skip
def test_a_broken_model_index_is_a_one_line_error(tmp_path: Path, document: str, message: str):
    (tmp_path / "model_index.json").write_text(document)

    with pytest.raises(NotAModel, match=message):
        open_model(tmp_path)


def test_the_error_for_a_folder_of_single_files_lists_them(tmp_path: Path):
    write_weights(tmp_path / "some-lora.safetensors", WEIGHTS)

    with pytest.raises(NotAModel, match=r"open one of its files: some-lora\.safetensors"):
        open_model(tmp_path)


def test_the_hash_of_a_model_in_several_files_is_the_hash_of_their_hashes(tmp_path: Path):
    import hashlib

    write_json(tmp_path / "config.json", {"a": 1})
    write_weights(tmp_path / "model.safetensors", WEIGHTS)
    hashes = [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    ]

    assert open_model(tmp_path).sha256() == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert open_model(tmp_path / "model.safetensors").sha256() == hashes[1]
