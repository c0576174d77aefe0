"""NaN and infinity: computed again in float32 where that helps, recorded in the recipe, never painted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gouache
from gouache import Model, Picture
from gouache.app.settings import Settings
from gouache.errors import ModelError
from tests.pipelines import Narrow, altered

# A weight of each stage whose output is normalised afterwards: if it is large, float16 overflows, and float32 does not.
LARGE = {
    "U-Net": "model.diffusion_model.input_blocks.0.0.weight",
    "VAE": "first_stage_model.decoder.conv_in.weight",
    "text encoder": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.weight",
}
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3, "size": (64, 64), "negative": "dog"}

Narrows = Callable[[str], Narrow]


def parts(model: Model) -> dict[str, nn.Module]:
    return {"U-Net": model.unet, "VAE": model.vae, "text encoder": model.text_encoders["text_encoder"]}


def paint(model: Model, **options: Any) -> Picture:
    return next(model.paint("a cat", **OPTIONS | options))


def overflowing(stage: str, narrow: Narrows, target: Path) -> Path:
    """A model whose weights fit float16, but the results of `stage` do not."""

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[LARGE[stage]] *= 60000 / tensors[LARGE[stage]].abs().max()

    return altered(narrow("sd1").file, target, enlarge)


@pytest.mark.parametrize("stage", LARGE)
def test_a_stage_that_overflows_is_computed_again_in_float32(
    stage: str, narrow: Narrows, settings: Settings, tmp_path: Path
):
    file = overflowing(stage, narrow, tmp_path / "model.safetensors")
    model, upcast = (gouache.load(file, dtype="fp16", settings=settings) for _ in range(2))
    parts(upcast)[stage].float()  # from the start

    picture, expected = paint(model), paint(upcast)

    assert picture.recipe["dtype"] == "fp16" and picture.recipe["upcast"] == [stage]
    assert expected.recipe["upcast"] == []
    assert torch.isfinite(picture.latent).all()
    assert picture.image.tobytes() == expected.image.tobytes()
    dtypes = {name: next(part.parameters()).dtype for name, part in parts(model).items()}
    assert dtypes == {name: torch.float32 if name == stage else torch.float16 for name in LARGE}


def test_the_next_picture_is_computed_in_float32_at_once(narrow: Narrows, settings: Settings, tmp_path: Path):
    file = overflowing("U-Net", narrow, tmp_path / "model.safetensors")
    model = gouache.load(file, dtype="fp16", settings=settings)
    first = paint(model)
    steps: list[int] = []

    second = next(model.paint("a cat", on_step=lambda step: steps.append(step.index), **OPTIONS))

    assert steps == [0, 1]
    assert second.recipe["upcast"] == first.recipe["upcast"] == ["U-Net"]
    assert second.image.tobytes() == first.image.tobytes()


def test_encoding_an_init_picture_is_guarded_too(narrow: Narrows, settings: Settings, tmp_path: Path):
    def enlarge(tensors: dict[str, Tensor]) -> None:
        weight = tensors["first_stage_model.encoder.conv_in.weight"]
        weight *= 60000 / weight.abs().max()

    file = altered(narrow("sd1").file, tmp_path / "model.safetensors", enlarge)
    init = paint(gouache.load(narrow("sd1").file, settings=settings)).save(tmp_path / "init.png")

    picture = paint(gouache.load(file, dtype="fp16", settings=settings), init=init)

    assert picture.recipe["upcast"] == ["VAE"]
    assert torch.isfinite(picture.latent).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_without_nan_stays_in_its_dtype(dtype: str, narrow: Narrows, settings: Settings):
    picture = paint(gouache.load(narrow("sd1").file, dtype=dtype, settings=settings))

    assert picture.recipe["dtype"] == dtype and picture.recipe["upcast"] == []


def test_bfloat16_and_float32_give_the_same_picture_up_to_rounding(narrow: Narrows, settings: Settings):
    exact, rounded = (
        paint(gouache.load(narrow("sd1").file, dtype=dtype, settings=settings), steps=1, cfg=1)
        for dtype in ("fp32", "bf16")
    )

    difference = np.asarray(exact.image, np.float32) - np.asarray(rounded.image, np.float32)
    assert 0 < np.abs(difference).mean() < 4


@pytest.mark.parametrize(("dtype", "value"), [("fp32", math.nan), ("bf16", math.inf)])
@pytest.mark.parametrize("stage", LARGE)
def test_damaged_weights_are_refused_with_the_name_of_the_stage(
    stage: str, dtype: str, value: float, narrow: Narrows, settings: Settings, tmp_path: Path
):
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[LARGE[stage]].view(-1)[5] = value

    file = altered(narrow("sd1").file, tmp_path / "damaged.safetensors", damage)

    with pytest.raises(ModelError) as caught:
        paint(gouache.load(file, dtype=dtype, settings=settings))

    message = str(caught.value)
    reason = "its VAE is damaged, decoder." if stage == "VAE" else f"the {stage} gives NaN"  # detected while loading
    assert message.startswith(f"{file}: {reason}") and "\n" not in message


def test_an_entirely_black_picture_is_refused(narrow: Narrows, settings: Settings, tmp_path: Path):
    def darken(tensors: dict[str, Tensor]) -> None:
        tensors["first_stage_model.decoder.conv_out.weight"].zero_()
        tensors["first_stage_model.decoder.conv_out.bias"].fill_(-1.5)

    model = gouache.load(altered(narrow("sd1").file, tmp_path / "dark.safetensors", darken), settings=settings)

    with pytest.raises(ModelError, match="the VAE gives NaN, infinite or black results even in float32"):
        paint(model)


def test_one_nan_latent_in_a_batch_is_refused(loaded: Callable[[str], Model]):
    model = loaded("sd1")
    latents = torch.zeros(2, 4, 8, 8)
    latents[1] = math.nan

    with pytest.raises(ModelError, match="the VAE"):
        model.decode(latents)
