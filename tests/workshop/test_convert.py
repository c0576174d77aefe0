"""`convert`: bitwise equal weights under the official names, in a file that appears completely or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import FileError, ModelError, RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.workshop.convert import convert
from tests.layouts.manifests import shapes
from tests.pipelines import Narrow, altered, build, save, text_encoder

Narrows = Callable[[str], Narrow]


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    weights = (torch.randn(3 + n, 5, generator=generator).to(dtype) for n, dtype in enumerate(dtypes))
    return {f"layer.{n}.weight": weight for n, weight in enumerate(weights)} | {
        "positions": torch.arange(77)[None],
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "transposed": torch.randn(6, 4, generator=generator).T,
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zip_form", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False], ids=["state_dict", "bare"])
def test_a_pickle_is_converted_to_safetensors_bit_for_bit(zip_form: bool, nested: bool, tmp_path: Path):
    tensors = some_tensors()
    content: dict[str, Any] = {"state_dict": tensors, "global_step": 5} if nested else tensors
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zip_form)

    done = convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors")

    assert_equal(load_file(tmp_path / "model.safetensors"), tensors)
    assert done.tensors == len(tensors) and done.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_tensors_that_share_storage_are_written_separately(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "row": whole[1], "same": whole}
    torch.save(tensors, tmp_path / "model.pt")

    convert(tmp_path / "model.pt", tmp_path / "model.safetensors")

    assert_equal(load_file(tmp_path / "model.safetensors"), tensors)


def test_names_and_metadata_of_a_safetensors_file_are_kept(tmp_path: Path):
    save_file(some_tensors() | {"transposed": torch.zeros(2)}, tmp_path / "a.safetensors", {"author": "somebody"})

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    assert_equal(load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "a.safetensors"))
    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        assert opened.metadata()["author"] == "somebody"


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_dtype_casts_floating_point_tensors_as_torch_does_and_keeps_the_rest(
    name: str, dtype: torch.dtype, tmp_path: Path
):
    torch.save(some_tensors(), tmp_path / "model.ckpt")

    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors", dtype=name)

    expected = {key: each.to(dtype) if each.is_floating_point() else each for key, each in some_tensors().items()}
    assert_equal(load_file(tmp_path / "model.safetensors"), expected)


SCHEDULE = {
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "model_ema.decay", "model_ema.num_updates",
}  # fmt: skip
# SD2's folder lacks the text encoder's last block, which is never used, and the tensors OpenCLIP applies to its output.
BLOCK_23 = {
    f"cond_stage_model.model.transformer.resblocks.23.{name}"
    for name in (
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "ln_1.weight",
        "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    )
}  # fmt: skip
OFFICIAL: dict[str, tuple[str, set[str]]] = {  # the released file, and its tensors that folders do not hold
    "sd1": ("sd15_emaonly", SCHEDULE | {"cond_stage_model.transformer.text_model.embeddings.position_ids"}),
    "sd1-inpainting": (
        "sd15_inpainting",
        SCHEDULE | {"cond_stage_model.transformer.text_model.embeddings.position_ids"},
    ),
    "sd2": (
        "sd21_768_v",
        SCHEDULE | BLOCK_23 | {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"},
    ),
    "sdxl": (
        "sdxl_base",
        {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            "conditioner.embedders.1.model.logit_scale",
        },
    ),
}


def as_deep_as_released(line: str, clip_folder: Path) -> Any:
    """A narrow pipeline with all blocks of the released one, whose widths increase at the same levels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipeline = build(line, clip_folder)
    base = 32 if line.startswith("sd1") else 64
    widths = (base, 2 * base, 4 * base) if line == "sdxl" else (base, 2 * base, 4 * base, 4 * base)
    changes: dict[str, Any] = {"block_out_channels": widths}
    if base == 64:
        changes["attention_head_dim"] = tuple(width // 64 for width in widths)
    if line == "sdxl":
        changes["transformer_layers_per_block"] = (1, 2, 10)
        pipeline.text_encoder_2 = text_encoder(128, 32, "gelu", seed=2, projection=96)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **changes})
    pipeline.vae = AutoencoderKL.from_config({**pipeline.vae.config, "block_out_channels": (32, 64, 128, 128)})
    if line != "sd2":
        pipeline.text_encoder = text_encoder(64, 12, "quick_gelu", seed=1)
    return pipeline


@pytest.mark.parametrize("line", OFFICIAL)
def test_a_folder_is_converted_to_a_single_file_with_the_official_names(line: str, clip_folder: Path, tmp_path: Path):
    folder = save(as_deep_as_released(line, clip_folder), tmp_path / "folder")
    released, absent = OFFICIAL[line]

    done = convert(folder, tmp_path / "model.safetensors")

    official = shapes(released)
    assert absent <= official.keys()
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == official.keys() - absent
    assert all(written[name].ndim == len(official[name]) for name in written)
    assert done.form == "safetensors" and not done.left_out


def test_the_single_files_metadata_states_prediction_and_size_of_the_folder(narrow: Narrows):
    for line, prediction in (("sd1", "eps"), ("sd2", "v"), ("sdxl", "eps")):
        found = identify(open_model(narrow(line).file))

        assert found.prediction is not None and found.size is not None
        assert (found.prediction.value, found.prediction.confidence) == (prediction, "certain")
        assert (found.size.value, found.size.confidence) == ((64, 64), "certain")


def test_a_guess_is_not_written_as_metadata(narrow: Narrows, tmp_path: Path):
    """SD2 predicts noise or velocity, and a narrow model's weights do not show which."""
    tensors = load_file(narrow("sd2").file)
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")

    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors")

    before, after = (identify(open_model(tmp_path / name)) for name in ("model.ckpt", "model.safetensors"))
    assert before.prediction is not None and after.prediction is not None
    assert before.prediction.confidence == after.prediction.confidence == "guess"


def test_a_folder_of_an_unknown_family_is_refused(tmp_path: Path):
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    save_file(
        {"conv_in.weight": torch.zeros(4, 4, 3, 3)},
        tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors",
    )

    with pytest.raises(ModelError):
        convert(tmp_path / "folder", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_existing_file_is_replaced_only_with_overwrite(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("an older file")

    with pytest.raises(RequestError, match="already exists"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_text() == "an older file"

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", overwrite=True)
    assert_equal(load_file(tmp_path / "b.safetensors"), {"a": torch.zeros(2)})


def test_a_file_can_be_converted_in_place(tmp_path: Path):
    """It stays mapped while the new file is written next to it."""
    path = tmp_path / "a.safetensors"
    tensors = {f"layer.{n}": torch.randn(100, 100, generator=torch.Generator().manual_seed(n)) for n in range(5)}
    save_file(tensors, path)

    convert(path, path, dtype="fp16", overwrite=True)

    assert_equal(load_file(path), {name: tensor.half() for name, tensor in tensors.items()})
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_invalid_target_or_dtype_is_refused(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")

    with pytest.raises(RequestError, match=r"ends in neither \.safetensors nor \.ckpt"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.safetensor")
    with pytest.raises(RequestError, match=r"safetensors does not match .*a\.ckpt, which names a \.ckpt file"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.ckpt", to="safetensors")
    with pytest.raises(RequestError, match="dtype: 'int8' is not known"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="int8")
    with pytest.raises(FileError, match="its folder does not exist"):
        convert(tmp_path / "a.safetensors", tmp_path / "absent" / "b.safetensors")


KILLED = """
import os, signal, sys
from pathlib import Path
from gouache.workshop import convert, save

stream_safetensors = save.stream_safetensors

def killed(target, infos, read, metadata, **more):
    done = []
    def read_or_die(name):
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(name)
        return read(name)
    return stream_safetensors(target, infos, read_or_die, metadata, **more)

save.stream_safetensors = killed
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_conversion_killed_while_writing_leaves_existing_files_unchanged(narrow: Narrows, tmp_path: Path):
    source = Path(shutil.copy(narrow("sd1").file, tmp_path / "model.safetensors"))
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    (tmp_path / "older.safetensors").write_text("an older file")

    for target in (tmp_path / "new.safetensors", tmp_path / "older.safetensors", source):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)])

        assert ended.returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "older.safetensors"]
    assert (tmp_path / "older.safetensors").read_text() == "an older file"
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before


def test_an_unreadable_tensor_leaves_no_target(tmp_path: Path):
    """The header is intact, but the data of the last tensor is missing."""
    torch.save({f"layer.{n}": torch.zeros(1000) for n in range(4)}, tmp_path / "model.ckpt")
    damaged = bytearray((tmp_path / "model.ckpt").read_bytes())
    at = damaged.rfind(b"data/3")  # in the archive's central directory, which comes last
    damaged[at : at + 6] = b"data/9"
    (tmp_path / "model.ckpt").write_bytes(damaged)

    with pytest.raises(FileError):
        convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors")

    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_single_file_keeps_its_ema_weights(narrow: Narrows, tmp_path: Path):
    """A single file keeps all its tensors and their names: nothing is dropped unless requested."""

    def add_averages(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1

    file = altered(narrow("sd1").file, tmp_path / "full.safetensors", add_averages)

    convert(file, tmp_path / "again.safetensors")

    assert_equal(load_file(tmp_path / "again.safetensors"), load_file(file))


# ---- round trips


LINES = ("sd1", "sd1-inpainting", "sd1-edit", "sd2", "sd2-depth", "sdxl")
ALIKE = ("sd1-inpainting", "sd1-edit", "sd2", "sd2-depth")  # in the structure of their names as sd1


def with_everything(tensors: dict[str, Tensor]) -> None:
    """Add the tensors that released files have besides the weights of their networks."""
    for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["betas"] = torch.linspace(0, 1, 1000, dtype=torch.float64)
    if any(name.startswith("cond_stage_model.transformer.text_model.") for name in tensors):
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    layer = "cond_stage_model.model.transformer.resblocks."
    for name in [name for name in tensors if name.startswith(f"{layer}22.")]:  # SD2's 24th block, which is never used
        tensors[name.replace(f"{layer}22.", f"{layer}23.")] = tensors[name] + 2
    if any(name.startswith(layer) for name in tensors):
        tensors["cond_stage_model.model.text_projection"] = torch.ones(64, 64)
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)


@pytest.mark.parametrize("line", [pytest.param(e, marks=pytest.mark.full) if e in ALIKE else e for e in LINES])
def test_a_round_trip_restores_every_tensor(narrow: Narrows, line: str, tmp_path: Path):
    """Single file -> folder -> .ckpt -> single file."""
    file = altered(narrow(line).file, tmp_path / "a.safetensors", with_everything)

    done = convert(file, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.ckpt")
    convert(tmp_path / "back.ckpt", tmp_path / "again.safetensors")

    assert_equal(load_file(tmp_path / "again.safetensors"), load_file(file))
    assert_equal(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], load_file(file))
    assert sum(done.leftovers.values()) == len(load_file(tmp_path / "folder" / "leftovers.safetensors")) > 0


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_unusual_names_survive_a_round_trip(narrow: Narrows, line: str, tmp_path: Path):
    """The earliest SD1 files lack `text_model.` in their names."""

    def old_names(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".transformer.text_model." in name]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)

    file = altered(narrow(line).file, tmp_path / "a.safetensors", old_names)

    convert(file, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")

    assert_equal(load_file(tmp_path / "again.safetensors"), load_file(file))


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_a_folder_has_the_weights_and_configs_that_diffusers_saved(narrow: Narrows, line: str, tmp_path: Path):
    model = narrow(line)

    convert(model.file, tmp_path / "folder")

    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if line == "sdxl" else [])):
        found, expected = (
            load_file(next(path for path in (folder / part).iterdir() if path.suffix == ".safetensors"))
            for folder in (tmp_path / "folder", model.folder)
        )
        # Transformers 5 saves text encoders without the prefix text_model.
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        assert_equal(found, {name.removeprefix("text_model."): tensor for name, tensor in expected.items()})
        config, saved = (
            json.loads((folder / part / "config.json").read_text()) for folder in (tmp_path / "folder", model.folder)
        )
        for key in config.keys() & saved.keys() - {"_diffusers_version", "transformer_layers_per_block"}:
            if not key.endswith("_token_id"):
                assert config[key] == saved[key] or [config[key]] * 4 == saved[key], (part, key)


def test_one_component_can_be_written_as_file_and_as_folder(narrow: Narrows, tmp_path: Path):
    file = narrow("sd1").file

    for only in ("unet", "vae", "text"):
        convert(file, tmp_path / f"{only}.safetensors", only=only)
        convert(file, tmp_path / f"{only}-folder", only=only)

        found = identify(open_model(tmp_path / f"{only}.safetensors"))
        assert found.kind.value == {"unet": "unet", "vae": "vae", "text": "text encoder"}[only] and not found.unknown
        in_folder = identify(open_model(tmp_path / f"{only}-folder"))
        assert in_folder.components.keys() == found.components.keys()
    with pytest.raises(RequestError, match="use text_encoder or text_encoder_2 instead of text"):
        convert(narrow("sdxl").file, tmp_path / "t.safetensors", only="text")
    with pytest.raises(ModelError, match="has no usable vae"):
        convert(tmp_path / "unet.safetensors", tmp_path / "v.safetensors", only="vae")


def test_fp8_is_used_for_matrices_only(narrow: Narrows, tmp_path: Path):
    convert(narrow("sd1").file, tmp_path / "m.safetensors", dtype="fp8_e4m3")

    source = load_file(narrow("sd1").file)
    for name, tensor in load_file(tmp_path / "m.safetensors").items():
        dtype = torch.float8_e4m3fn if tensor.ndim > 1 else torch.float16
        assert tensor.dtype == dtype and torch.equal(tensor.float(), source[name].to(dtype).float()), name


@pytest.mark.parametrize(
    ("source", "dtype", "rounded_to"),
    [
        (torch.float32, None, None),
        (torch.float32, "fp16", "fp16"),
        (torch.float32, "fp8_e4m3", "fp8_e4m3"),
        (torch.float16, "fp16", None),
        (torch.float16, "fp32", None),
        (torch.float16, "bf16", "bf16"),
        (torch.float64, "fp32", "fp32"),
        (torch.float8_e4m3fn, "fp16", None),
    ],
    ids=str,
)
def test_the_result_states_whether_values_were_rounded(
    source: torch.dtype, dtype: str | None, rounded_to: str | None, tmp_path: Path
):
    save_file({"a": torch.randn(4, 4).to(source)}, tmp_path / "a.safetensors")

    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype=dtype).rounded_to == rounded_to


def test_a_value_too_large_for_the_dtype_stops_the_conversion(tmp_path: Path):
    save_file({"a": torch.tensor([[1e5, 1.0]])}, tmp_path / "a.safetensors")

    with pytest.raises(ModelError, match=r"a has values up to 100000, too large for F16; use bf16"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="fp16")
    assert not (tmp_path / "b.safetensors").exists()


def test_numbers_stored_next_to_the_weights_are_kept(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(2)}, "global_step": 840001, "lr": 1e-5}, tmp_path / "a.ckpt")

    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", metadata={"modelspec.author": "somebody"})
    convert(tmp_path / "a.ckpt", tmp_path / "c.ckpt")

    with safe_open(tmp_path / "b.safetensors", "pt") as opened:
        assert opened.metadata() | {"modelspec.author": "somebody", "global_step": "840001"} == opened.metadata()
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["global_step"] == 840001


FOLDER_KILLED = KILLED.replace(", overwrite=True)", ")")


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_conversion_killed_while_writing_a_folder_leaves_none_and_the_next_run_cleans_up(
    narrow: Narrows, tmp_path: Path
):
    ended = subprocess.run([sys.executable, "-c", FOLDER_KILLED, str(narrow("sd1").file), str(tmp_path / "folder")])

    assert ended.returncode == -9 and not (tmp_path / "folder").exists()
    convert(narrow("sd1").file, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
