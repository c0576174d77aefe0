"""Files exchanged between Gouache and diffusers, in both directions, give the same pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.app.settings import Settings
from gouache.diffusion.noise import Noise
from tests.pipelines import Narrow, save, scheduler

LINES = ("sd1", "sd2", "sdxl")
FORMS: dict[str, tuple[dict[str, Any], str]] = {  # options of save_pretrained, and the suffix of all weight files
    "whole": ({}, "model.safetensors"),
    "bin": ({"safe_serialization": False}, "model.bin"),
    "fp16 variant": ({"variant": "fp16"}, "model.fp16.safetensors"),
    "shards": ({"max_shard_size": "2MB"}, ".safetensors"),
}


def gouache_latent(model: Model) -> Tensor:
    """The latent (C, h, w) after three Euler steps in Gouache."""
    settings: dict[str, Any] = {"steps": 3, "seed": 1, "size": (64, 64), "sampler": "Euler", "negative": "dog"}
    return next(model.paint("a cat", **settings)).latent


def diffusers_latent(pipeline: Any, line: str) -> Tensor:
    """The same latent from diffusers."""
    pipeline.scheduler = scheduler("Euler", line)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"width": 64, "height": 64, "guidance_scale": 7.0, "output_type": "latent"}
    latents = Noise([1], (4, 8, 8)).start()
    return pipeline("a cat", negative_prompt="dog", num_inference_steps=3, latents=latents, **options).images[0]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-4 of the latents' standard deviation: the sigmas of the three steps agree to the last bits."""
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("line", [*LINES, "sd1-inpainting"])
def test_diffusers_loads_the_single_file_and_paints_the_same(
    line: str, narrow: Callable[[str], Narrow], loaded: Callable[[str], Model]
):
    model = narrow(line)
    options: dict[str, Any] = {"config": str(model.folder), "local_files_only": True}
    options |= {"add_watermarker": False} if line == "sdxl" else {}

    opened = type(model.pipeline).from_single_file(str(model.file), **options)

    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (before := getattr(model.pipeline, name, None)) is not None:
            after = getattr(opened, name).state_dict()
            assert after.keys() == before.state_dict().keys()
            assert all(torch.equal(after[key], weight) for key, weight in before.state_dict().items())
    if line in LINES:
        assert_same(gouache_latent(loaded(line)), diffusers_latent(opened, line))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("line", LINES)
def test_a_folder_saved_by_diffusers_paints_the_same_in_gouache(
    line: str, form: str, narrow: Callable[[str], Narrow], settings: Settings, tmp_path: Path
):
    pipeline = narrow(line).pipeline
    options, suffix = FORMS[form]
    if form == "fp16 variant":
        pipeline = copy.deepcopy(pipeline).to(torch.float16)
    folder = save(pipeline, tmp_path / "folder", **options)
    if form == "bin":
        pickle_text_encoders(folder)

    model = gouache.load(folder, settings=settings)

    weights = [path.name for path in model.file.files if path.suffix != ".json"]
    assert all(name.endswith(suffix) for name in weights)
    assert len(weights) > 4 * 2 if form == "shards" else len(weights) in (3, 4)
    assert_same(gouache_latent(model), diffusers_latent(pipeline.to(torch.float32), line))


def pickle_text_encoders(folder: Path) -> None:
    """Replace the .safetensors files that Transformers writes now with the .bin files of its earlier releases."""
    for path in folder.glob("text_encoder*/model.safetensors"):
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
