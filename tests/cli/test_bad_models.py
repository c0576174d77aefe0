"""Files that are not a model, or not a whole one: one line that says why, exit code 2, and nothing written."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import Command
from tests.layouts.manifests import manifest
from tests.pipelines import Narrow, altered, text_encoder

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."

Change = Callable[[dict[str, Tensor]], object]


def without(prefix: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def wider(tensors: dict[str, Tensor]) -> None:
    tensors[UNET + "time_embed.2.weight"] = torch.zeros(128, 129)


def unknown_tensor(tensors: dict[str, Tensor]) -> None:
    tensors[UNET + "secret.weight"] = torch.zeros(3)


CHANGED: dict[str, tuple[Change, str]] = {
    "no VAE": (
        without(VAE),
        "has no usable VAE (not in the file; single files keep it under first_stage_model.), and no VAE",
    ),
    "no text encoder": (without(TEXT), "has no usable text_encoder: not in the file; single files keep it under"),
    "no U-Net": (without(UNET), "has no usable unet: "),
    "half a U-Net": (without(UNET + "output_blocks.7."), "has no usable unet: "),
    "one tensor short": (
        without(VAE + "quant_conv.bias"),
        "no usable VAE (1 of 244 tensors is missing: quant_conv.bias), and no VAE",
    ),
    "wrong shape": (wider, "unet: time_embed.2.weight has shape [128, 129], but the others require [128, 128]"),
    "unknown tensor": (
        unknown_tensor,
        "looks like Stable Diffusion 1, but holds 1 tensor",
    ),
}


@pytest.fixture
def refused(gouache: Command, tmp_path: Path) -> Callable[[Path], str]:
    """The line with which `paint` refuses a model."""

    def run(model: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        ended = gouache("paint", "a cat", "-m", model, "--steps", 1, "--size", "64x64")
        assert ended.code == 2 and ended.out == ""
        assert ended.err.startswith("error: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1
        assert len(ended.err) < 1000 and "Traceback" not in ended.err
        assert sorted(tmp_path.rglob("*")) == before
        return ended.err

    return run


@pytest.mark.parametrize("case", CHANGED)
def test_an_incomplete_or_damaged_model_is_refused(
    case: str, narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path
):
    change, line = CHANGED[case]

    message = refused(altered(narrow("sd1").file, tmp_path / "model.safetensors", change))

    assert line in message and "Stable Diffusion 1" in message


def wider_text(tensors: dict[str, Tensor]) -> None:
    without(TEXT)(tensors)
    tensors |= {TEXT + name: each for name, each in text_encoder(128, 4, "quick_gelu", seed=1).state_dict().items()}


def narrower_pooled(tensors: dict[str, Tensor]) -> None:
    tensors["conditioner.embedders.1.model.text_projection"] = torch.zeros(128, 64)


def seven_channels(tensors: dict[str, Tensor]) -> None:
    tensors[UNET + "input_blocks.0.0.weight"] = torch.zeros(32, 7, 3, 3)


MISMATCHED: dict[str, tuple[str, Change, str]] = {
    "text encoder": ("sd1", wider_text, "the U-Net expects cross-attention width 64, the text encoders give 128"),
    "pooled": (
        "sdxl",
        narrower_pooled,
        "expects vector width (pooled prompt and sizes) 1632, the text encoders give 1600",
    ),
    "channels": ("sd1", seven_channels, "the variant 7 channels cannot be painted with yet"),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_parts_of_different_models_are_refused(
    case: str, narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path
):
    family, change, line = MISMATCHED[case]

    assert line in refused(altered(narrow(family).file, tmp_path / "model.safetensors", change))


def test_a_folder_whose_second_text_encoder_is_the_first_is_refused(
    narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path
):
    folder = Path(shutil.copytree(narrow("sdxl").folder, tmp_path / "folder"))
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")

    assert "has no usable text_encoder_2: text_projection is missing" in refused(folder)


def tiny(name: str) -> dict[str, Tensor]:
    """Tensors with the names and ranks of an official file, all sides 1."""
    return {key: torch.zeros([1] * len(shape)) for key, (shape, _) in manifest(name).items()}


def lora(rank: int = 4) -> dict[str, Tensor]:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.zeros(rank, 320), torch.zeros(320, rank)
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(1.0)}


def test_other_kinds_of_files_are_named(refused: Callable[[Path], str], tmp_path: Path):
    others: dict[str, tuple[dict[str, Tensor], str]] = {
        "lora": (lora(), "is not a model to paint with: it is lora"),
        "video": (tiny("svd"), "is Stable Video Diffusion, which can be inspected and converted but not painted with"),
        "embedding": ({"emb_params": torch.zeros(2, 768)}, "it is embedding"),
        "unknown": ({"hello": torch.zeros(2)}, "it is unknown"),
    }

    for name, (tensors, line) in others.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        assert line in refused(path)


def test_a_single_component_is_named(narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path):
    path = tmp_path / "vae.safetensors"
    save_file({k.removeprefix(VAE): v for k, v in load_file(narrow("sd1").file).items() if k.startswith(VAE)}, path)

    assert "is not a model to paint with: it is vae" in refused(path)
    assert "is not a model to paint with: it is unet" in refused(narrow("sd1").folder / "unet")


def test_a_folder_without_a_component_is_refused(
    narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path
):
    folder = Path(shutil.copytree(narrow("sd1").folder, tmp_path / "folder"))
    shutil.rmtree(folder / "vae")

    assert "has no usable VAE (" in refused(folder)


def test_damaged_files_and_other_formats_are_refused(
    narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path
):
    whole = narrow("sd1").file.read_bytes()
    page = b"<!DOCTYPE html>\n<html><head><title>401 Unauthorized</title></head></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n"
    files: dict[str, tuple[bytes, str]] = {
        "half.safetensors": (whole[: len(whole) // 2], "half.safetensors: "),
        "header.safetensors": (whole[:1000], "header.safetensors: "),
        "page.safetensors": (page, "web page"),
        "page.ckpt": (page, "web page"),
        "pointer.safetensors": (pointer, "git-lfs pointer"),
        "empty.safetensors": (b"", "is empty"),
        "noise.ckpt": (bytes(range(256)) * 40, "noise.ckpt: "),
        "picture.safetensors": (b"\x89PNG\r\n\x1a\n" + b"0" * 100, "picture"),
    }

    for name, (content, line) in files.items():
        (tmp_path / name).write_bytes(content)
        assert line in refused(tmp_path / name)


class Attack:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self._target}",)


def zipped(pickled: bytes) -> bytes:
    """A torch file in zip format with this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["plain", "zip", "legacy", "next to the weights"])
def test_a_pickle_with_code_is_refused_and_not_run(
    form: str, narrow: Callable[[str], Narrow], refused: Callable[[Path], str], tmp_path: Path
):
    created, path = tmp_path / "created", tmp_path / "model.ckpt"
    pickled = pickle.dumps({"state_dict": {"weight": Attack(created)}}, protocol=2)
    match form:
        case "plain":
            path.write_bytes(pickled)
        case "zip":
            path.write_bytes(zipped(pickled))
        case "legacy":
            heads = [pickle.dumps(each, protocol=2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
            path.write_bytes(b"".join([*heads, pickled, pickle.dumps([], protocol=2)]))
        case _:
            torch.save({"state_dict": load_file(narrow("sd1").file), "callback": Attack(created)}, path)

    assert "system" in refused(path)
    assert not created.exists()


def test_a_missing_path_and_a_folder_without_a_model_are_refused(refused: Callable[[Path], str], tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("nothing")

    assert "there is no file" in refused(tmp_path / "absent.safetensors")
    assert "is a folder without a model" in refused(tmp_path / "folder")


@pytest.mark.parametrize("command", [("inspect",), ("convert",)])
def test_the_other_commands_refuse_in_the_same_way(command: tuple[str, ...], gouache: Command, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("<html></html>")

    ended = gouache(*command, path, *(["out.safetensors"] if command == ("convert",) else []))

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {path}: ") and ended.err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_control_characters_in_names_are_escaped(refused: Callable[[Path], str], tmp_path: Path):
    header = {"\x1b[31mred\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")

    assert "\x1b" not in refused(path)


def test_nothing_is_saved_if_a_stage_gives_nan_or_black(
    gouache: Command, narrow: Callable[[str], Narrow], tmp_path: Path
):
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[UNET + "out.2.bias"][0] = torch.nan

    def darken(tensors: dict[str, Tensor]) -> None:
        tensors[VAE + "decoder.conv_out.weight"].zero_()
        tensors[VAE + "decoder.conv_out.bias"].fill_(-2)

    for stage, change in (("U-Net", damage), ("VAE", darken)):
        model = altered(narrow("sd1").file, tmp_path / "model.safetensors", change)

        ended = gouache("paint", "a cat", "-m", model, "--steps", 1, "--size", "64x64", "-o", "out/")

        assert ended.code == 2 and f"the {stage} gives NaN, infinite or black" in ended.err
        assert ended.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
