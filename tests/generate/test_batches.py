"""A batch of N equals N single pictures, and the same request gives the same picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gouache import Model
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.samplers.catalog import SAMPLERS

Models = Callable[[str], Model]
OPTIONS: dict[str, Any] = {"steps": 3, "seed": 11, "size": (64, 64), "negative": "dog"}


def first_inputs(model: Model, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Tensor]:
    """The x that the denoiser receives first, for each batch of a request of one step."""
    received: list[Tensor] = []
    denoise = model.denoise

    def watched(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        received.append(x.clone())
        return denoise(x, sigma, conditioning)

    with monkeypatch.context() as patch:
        patch.setattr(model, "denoise", watched)
        list(model.paint("a cat", **OPTIONS | {"steps": 1, "cfg": 1} | options))
    return received


@pytest.mark.parametrize("rng", ["cpu", "nv"])
@pytest.mark.parametrize("variation", [{}, {"variation_seed": 5, "variation_strength": 0.3}])
def test_the_starting_noise_of_a_batch_is_bit_equal_to_that_of_single_pictures(
    rng: str, variation: dict[str, Any], loaded: Models, monkeypatch: pytest.MonkeyPatch
):
    options = {"sampler": "Euler", "count": 3, "rng": rng} | variation

    (batch,) = first_inputs(loaded("sd1"), monkeypatch, batch=3, **options)
    singles = first_inputs(loaded("sd1"), monkeypatch, batch=1, **options)

    assert len(singles) == 3
    assert torch.equal(batch, torch.cat(singles))


def test_picture_i_has_seed_plus_i(loaded: Models, monkeypatch: pytest.MonkeyPatch):
    """And variation seed plus i, as in A1111."""
    vary = {"variation_strength": 0.4}
    series = first_inputs(loaded("sd1"), monkeypatch, count=3, variation_seed=70, **vary)
    alone = [
        first_inputs(loaded("sd1"), monkeypatch, seed=11 + index, variation_seed=70 + index, **vary)[0]
        for index in range(3)
    ]

    assert all(torch.equal(a, b) for a, b in zip(series, alone, strict=True))
    assert not torch.equal(series[0], series[1])


@pytest.mark.parametrize("sampler", [info.name for info in SAMPLERS])
def test_pictures_of_a_batch_differ_from_single_ones_by_at_most_one_level(sampler: str, loaded: Models):
    model = loaded("sd1")

    together = list(model.paint("a (red:1.2) cat", sampler=sampler, count=2, batch=2, **OPTIONS))
    alone = [next(model.paint("a (red:1.2) cat", sampler=sampler, **OPTIONS | {"seed": seed})) for seed in (11, 12)]

    assert [picture.seed for picture in together] == [11, 12]
    for one, other in zip(together, alone):
        difference = np.asarray(one.image, np.int16) - np.asarray(other.image, np.int16)
        assert np.abs(difference).max() <= 1


def test_batches_of_sdxl_and_of_requests_with_a_picture(loaded: Models, tmp_path: Path):
    init = next(loaded("sd1").paint("a cat", **OPTIONS)).save(tmp_path / "init.png")
    for family, options in (("sdxl", {}), ("sd1", {"init": init}), ("sd1-inpainting", {"init": init})):
        model = loaded(family)

        together = list(model.paint("a cat", count=2, batch=2, **OPTIONS | options))
        alone = [next(model.paint("a cat", **OPTIONS | options | {"seed": seed})) for seed in (11, 12)]

        for one, other in zip(together, alone):
            difference = np.asarray(one.image, np.int16) - np.asarray(other.image, np.int16)
            assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("rng", ["cpu", "nv"])
def test_the_noise_does_not_depend_on_the_default_dtype(rng: str, loaded: Models, monkeypatch: pytest.MonkeyPatch):
    """Nor on torch's global generator."""
    options = {"sampler": "Euler a", "rng": rng, "variation_seed": 5, "variation_strength": 0.3}
    (expected,) = first_inputs(loaded("sd1"), monkeypatch, **options)

    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(7)
        (found,) = first_inputs(loaded("sd1"), monkeypatch, **options)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(found, expected)


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DPM++ 2M SDE"])
def test_the_same_request_twice_gives_the_same_file_bytes(sampler: str, loaded: Models, tmp_path: Path):
    files = []
    for name in ("one.png", "two.png"):
        files.append(next(loaded("sd1").paint("a cat", sampler=sampler, **OPTIONS)).save(tmp_path / name))

    assert files[0].read_bytes() == files[1].read_bytes()


def test_pictures_are_yielded_one_by_one_and_closing_stops_painting(loaded: Models):
    steps: list[int] = []

    pictures = loaded("sd1").paint("a cat", count=5, on_step=lambda step: steps.append(step.index), **OPTIONS)
    next(pictures)
    pictures.close()  # type: ignore[attr-defined]

    assert steps == [0, 1, 2]
