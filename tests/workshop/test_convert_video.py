"""`convert` for Stable Video Diffusion: single file to diffusers folder and back, and diffusers loading that folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gouache.errors import ModelError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.workshop import layout
from gouache.workshop.convert import convert
from gouache.workshop.merge import merge
from gouache.workshop.prune import prune
from gouache.workshop.recipe import Recipe, Source
from tests.layouts.manifests import manifest, shapes
from tests.layouts.svd_names import PAIRS
from tests.nn.narrow import scramble
from tests.pipelines import save

UNET, FIRST_STAGE, FRAME_VAE = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.3.encoder."
CLIP = "conditioner.embedders.0.open_clip.model."
VISUAL = f"{CLIP}visual."
LAYERS = 3  # of the image encoder's 32


def layer_of(name: str) -> int:
    """The layer of the image encoder that a tensor belongs to; 0 for tensors outside its layers."""
    block = f"{VISUAL}transformer.resblocks."
    return int(name.removeprefix(block).split(".")[0]) if name.startswith(block) else 0


def narrow_shapes() -> dict[str, tuple[int, ...]]:
    """The official key list with all widths divided, and fewer layers of the image encoder, which are all alike."""

    def divided(shape: tuple[int, ...], unit: int, by: int) -> tuple[int, ...]:
        return tuple(size // by if size % unit == 0 else size for size in shape)

    narrow: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes("svd").items():
        if name.startswith(UNET):
            narrow[name] = divided(shape, 320, 10)  # to 32, 64, 128, 128
        elif name.startswith((FIRST_STAGE, FRAME_VAE)):
            narrow[name] = divided(shape, 128, 4)
        elif layer_of(name) < LAYERS:
            narrow[name] = divided((shape[0] // 1000 or 1, *shape[1:]) if "token_embedding" in name else shape, 64, 16)
    return narrow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow single file in which no two tensors of the same shape are equal."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))).half()
        for name, shape in narrow_shapes().items()
    }
    path = tmp_path_factory.mktemp("svd") / "svd.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    """The folder that `convert` writes from that file."""
    convert(file, file.parent / "folder")
    return file.parent / "folder"


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Every weight of a diffusers folder, named `component/name`."""
    paths = [path for path in folder.rglob("*.safetensors") if path.parent != folder]
    return {f"{path.parent.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def is_leftover(name: str) -> bool:
    """Whether a folder has no place for it: the second encoder and decoder, and the rest of CLIP's text encoder."""
    if name.startswith(CLIP):
        return not name.startswith(VISUAL)
    return name.startswith((f"{FIRST_STAGE}encoder.", f"{FRAME_VAE}decoder.", f"{FRAME_VAE}post_quant_conv."))


def test_a_round_trip_restores_every_tensor(file: Path, folder: Path, tmp_path: Path):
    """Single file -> folder -> .ckpt -> single file."""
    convert(folder, tmp_path / "back.ckpt")
    convert(tmp_path / "back.ckpt", tmp_path / "again.safetensors")

    assert_equal(load_file(tmp_path / "again.safetensors"), load_file(file))
    assert_equal(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], load_file(file))


def test_tensors_without_a_place_in_a_folder_are_saved_as_leftovers(file: Path, folder: Path):
    expected = {name: tensor for name, tensor in load_file(file).items() if is_leftover(name)}

    assert_equal(load_file(folder / "leftovers.safetensors"), expected)


def test_tensors_get_their_diffusers_names(file: Path, folder: Path):
    """They include the encoder of the first frame, not the one that was only used in training."""
    before, after = load_file(file), load_folder(folder)
    pairs = {original: converted for original, converted in PAIRS.items() if original in before}

    assert len(pairs) == len(PAIRS)
    for original, converted in pairs.items():
        assert torch.equal(after[converted].flatten(), before[original].flatten()), (original, converted)


def test_the_image_encoders_fused_attention_is_split_and_its_projection_transposed(file: Path, folder: Path):
    before, after = load_file(file), load_folder(folder)

    for part, index in (("q", 0), ("k", 1), ("v", 2)):
        for leaf in ("weight", "bias"):
            split = after[f"image_encoder/vision_model.encoder.layers.1.self_attn.{part}_proj.{leaf}"]
            fused = before[f"{VISUAL}transformer.resblocks.1.attn.in_proj_{leaf}"]
            assert torch.equal(split, fused[80 * index : 80 * (index + 1)])
    assert torch.equal(after["image_encoder/visual_projection.weight"], before[f"{VISUAL}proj"].T)


def test_diffusers_loads_the_folder_without_missing_or_unexpected_weights(folder: Path):
    pipeline = StableVideoDiffusionPipeline.from_pretrained(str(folder))

    loaded = {
        f"{part}/{name}": tensor.half()  # the dtype in the folder
        for part in ("unet", "vae", "image_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }
    assert_equal(loaded, load_folder(folder))
    assert type(pipeline.scheduler) is EulerDiscreteScheduler
    pipeline.scheduler.set_timesteps(5)
    sigmas = pipeline.scheduler.sigmas[:-1].double()
    # Karras et al. 2022, equation 5, with rho = 7; the network receives ln(sigma) / 4 as timestep.
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = (700 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigmas, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pipeline.scheduler.timesteps.double(), 0.25 * expected.log(), rtol=1e-4, atol=1e-5)


def test_the_folder_is_recognised(folder: Path):
    found = identify(open_model(folder))

    assert found.family.value is not None and found.prediction is not None and found.levels is not None
    assert (found.family.value.name, found.family.confidence) == ("svd", "certain")
    assert (found.kind.value, set(found.components)) == ("diffusers folder", {"unet", "vae", "image_encoder"})
    assert (found.prediction.value, found.prediction.confidence) == ("v", "certain")
    assert (found.levels.value.kind, found.levels.value.low, found.levels.value.high) == ("edm", 0.002, 700)
    assert found.unknown == ()


# ---- folders written by diffusers


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from transformers import CLIPImageProcessor

    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), num_attention_heads=(1, 1, 2, 2), cross_attention_dim=48
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
    )
    vision = CLIPVisionConfig(
        hidden_size=80, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14,
        hidden_act="gelu", projection_dim=48,
    )  # fmt: skip
    return StableVideoDiffusionPipeline(
        vae=scramble(vae, seed=1),
        image_encoder=scramble(CLIPVisionModelWithProjection(vision), seed=2),
        unet=scramble(unet, seed=3),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        feature_extractor=CLIPImageProcessor(),
    )


def test_a_diffusers_folder_survives_a_round_trip_through_a_single_file(pipeline: Any, tmp_path: Path):
    weights = load_folder(save(pipeline, tmp_path / "folder"))

    convert(tmp_path / "folder", tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "again")

    written, official = load_file(tmp_path / "model.safetensors"), shapes("svd")
    assert written.keys() <= official.keys()
    assert {name for name in official.keys() - written.keys() if not is_leftover(name) and layer_of(name) < 2} == set()
    assert_equal(load_folder(tmp_path / "again"), weights)
    assert load_file(tmp_path / "again" / "leftovers.safetensors") == {}  # it holds metadata only


def test_the_configs_equal_those_of_diffusers(pipeline: Any, tmp_path: Path):
    save(pipeline, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "again")

    # Values that tensors do not show, and the image processor's class, which depends on the installed packages.
    ignored = {"sample_size", "num_frames", "dtype", "image_processor_type", "feature_extractor"}
    for path in ("unet/config.json", "vae/config.json", "image_encoder/config.json", "model_index.json",
                 "feature_extractor/preprocessor_config.json"):  # fmt: skip
        config, saved = (json.loads((tmp_path / name / path).read_text()) for name in ("again", "folder"))
        keys = {key for key in saved if key not in ignored and not key.endswith(("_version", "_name_or_path"))}
        assert {key: config[key] for key in keys} == {key: saved[key] for key in keys}, path


# ---- full-size models, by names and shapes alone


def official(name: str) -> ModelFile:
    """The official file as a ModelFile whose tensors cannot be read."""

    def read(key: str) -> Tensor:
        raise AssertionError(f"{key} was read, though only names and shapes are needed")

    tensors = {key: TensorInfo(tuple(shape), dtype) for key, (shape, dtype) in manifest(name).items()}
    return ModelFile(path=Path(f"/models/{name}.safetensors"), format="safetensors", tensors=tensors, read=read)


@pytest.mark.parametrize(("name", "frames"), [("svd", 14), ("svd_xt", 25)])
def test_official_files_convert_to_the_shapes_and_configs_of_the_released_folders(name: str, frames: int):
    file = official(name)

    folder = layout.folder(file, identify(file))

    extra = folder.file.extra
    unet, vae = extra["unet/config.json"], extra["vae/config.json"]
    with torch.device("meta"):
        models = {
            "unet": UNetSpatioTemporalConditionModel.from_config(unet),
            "vae": AutoencoderKLTemporalDecoder.from_config(vae),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**extra["image_encoder/config.json"])),
        }
    expected = {
        f"{part}/{key}": tuple(tensor.shape)
        for part, model in models.items()
        for key, tensor in model.state_dict().items()
    }
    assert {key: info.shape for key, info in folder.file.tensors.items()} == expected
    assert {key for key in file if is_leftover(key)} == set(folder.leftovers)
    released = {
        "block_out_channels": [320, 640, 1280, 1280], "num_attention_heads": [5, 10, 20, 20], "num_frames": frames,
        "cross_attention_dim": 1024, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 768,
        "transformer_layers_per_block": 1, "sample_size": 96, "in_channels": 8, "out_channels": 4,
    }  # fmt: skip
    assert {key: unet[key] for key in released} == released
    assert (vae["scaling_factor"], vae["force_upcast"], vae["sample_size"]) == (0.18215, True, 768)
    vision = extra["image_encoder/config.json"]
    assert (vision["num_attention_heads"], vision["image_size"], vision["hidden_act"]) == (16, 224, "gelu")
    scheduler = extra["scheduler/scheduler_config.json"]
    released = {"prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True,
                "timestep_type": "continuous"}  # fmt: skip
    assert {key: scheduler[key] for key in released} == released


# ---- single components, and incomplete files


def test_one_component_can_be_written_as_a_folder(file: Path, folder: Path, tmp_path: Path):
    weights = load_folder(folder)

    for only in ("unet", "vae"):
        for source, target in ((file, tmp_path / only), (folder, tmp_path / f"{only} again")):
            convert(source, target, only=only, to="diffusers")

            component = load_file(target / "diffusion_pytorch_model.safetensors")
            assert_equal({f"{only}/{name}": tensor for name, tensor in component.items()},
                         {name: tensor for name, tensor in weights.items() if name.startswith(f"{only}/")})  # fmt: skip
            assert json.loads((target / "config.json").read_text()) | {"num_frames": 0} == (
                json.loads((folder / only / "config.json").read_text()) | {"num_frames": 0}
            )


MISSING = {
    "input_blocks.1.0.time_mixer.mix_factor": (UNET, "no usable unet: 1 of 1428 tensors are missing, the first is"),
    "decoder.up.3.block.2.mix_factor": (FIRST_STAGE, "no usable vae: 1 of 374 tensors are missing, the first is"),
    "quant_conv.bias": (FRAME_VAE, "no usable vae: 1 of 374 tensors are missing, the first is"),
    "ln_pre.weight": (VISUAL, "no usable image_encoder: 1 of 56 tensors are missing, the first is vision_model"),
    "": (FRAME_VAE, f"it has no tensors under {FRAME_VAE}"),
}


@pytest.mark.parametrize("name", MISSING)
def test_an_incomplete_file_is_not_converted_to_a_folder(name: str, file: Path, tmp_path: Path):
    prefix, message = MISSING[name]
    tensors = load_file(file)
    kept = {each: t for each, t in tensors.items() if not each.startswith(prefix + name)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "model.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_an_image_encoder_with_empty_patches_is_refused(file: Path, tmp_path: Path):
    save_file(load_file(file) | {f"{VISUAL}conv1.weight": torch.zeros(80, 3, 0, 0)}, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match="no usable image_encoder: its patches are 0 pixels wide"):
        convert(tmp_path / "model.safetensors", tmp_path / "folder")


def test_unknown_tensors_are_saved_as_leftovers_and_restored(file: Path, tmp_path: Path):
    tensors = load_file(file) | {f"{UNET}input_blocks.1.0.camera.weight": torch.ones(3), "note": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")

    done = convert(tmp_path / "model.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")

    assert done.leftovers["diffusers folders have no place for it"] >= 2
    assert_equal(load_file(tmp_path / "again.safetensors"), tensors)


def test_pruning_and_merging_a_folder_gives_the_same_as_the_single_file(file: Path, folder: Path, tmp_path: Path):
    """Reading a folder splits its `vae` into the two components of the single file and restores the leftovers."""
    for name, source in (("file", file), ("folder", folder)):
        prune(source, tmp_path / f"{name}-pruned.safetensors")
        merge(Recipe(models=(Source(str(source)), Source(str(source)))), tmp_path / f"{name}-merged.safetensors")

    for operation in ("pruned", "merged"):
        one, other = (load_file(tmp_path / f"{name}-{operation}.safetensors") for name in ("file", "folder"))
        assert_equal(other, one)
