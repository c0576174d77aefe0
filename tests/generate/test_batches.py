"""A batch of N is N singles, and the same request is the same picture."""

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
KNOBS: dict[str, Any] = {"steps": 3, "seed": 11, "size": (64, 64), "negative": "dog"}


def first_inputs(model: Model, monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> list[Tensor]:
    """x as the denoiser first sees it, in each batch of a run."""
    seen: list[Tensor] = []
    denoise = model.denoise

    def watched(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(x.clone())
        return denoise(x, sigma, conditioning)

    with monkeypatch.context() as patch:
        patch.setattr(model, "denoise", watched)
        list(model.paint("a cat", **KNOBS | {"steps": 1, "cfg": 1} | knobs))
    return seen


@pytest.mark.parametrize("rng", ["cpu", "nv"])
@pytest.mark.parametrize("variation", [{}, {"variation_seed": 5, "variation_strength": 0.3}])
def test_the_starting_noise_of_a_batch_is_bit_equal_to_that_of_its_singles(
    rng: str, variation: dict[str, Any], loaded: Models, monkeypatch: pytest.MonkeyPatch
):
    knobs = {"sampler": "Euler", "count": 3, "rng": rng} | variation

    (batch,) = first_inputs(loaded("sd1"), monkeypatch, batch=3, **knobs)
    singles = first_inputs(loaded("sd1"), monkeypatch, batch=1, **knobs)

    assert len(singles) == 3
    assert torch.equal(batch, torch.cat(singles))


def test_picture_i_is_the_picture_of_seed_plus_i(loaded: Models, monkeypatch: pytest.MonkeyPatch):
    """And of variation seed plus i, as with A1111."""
    vary = {"variation_strength": 0.4}
    series = first_inputs(loaded("sd1"), monkeypatch, count=3, variation_seed=70, **vary)
    alone = [
        first_inputs(loaded("sd1"), monkeypatch, seed=11 + index, variation_seed=70 + index, **vary)[0]
        for index in range(3)
    ]

    assert all(torch.equal(a, b) for a, b in zip(series, alone, strict=True))
    assert not torch.equal(series[0], series[1])


@pytest.mark.parametrize("sampler", [info.name for info in SAMPLERS])
def test_pictures_of_a_batch_differ_from_singles_by_at_most_one_level(sampler: str, loaded: Models):
    model = loaded("sd1")

    together = list(model.paint("a (red:1.2) cat", sampler=sampler, count=2, batch=2, **KNOBS))
    alone = [next(model.paint("a (red:1.2) cat", sampler=sampler, **KNOBS | {"seed": seed})) for seed in (11, 12)]

    assert [picture.seed for picture in together] == [11, 12]
    for one, other in zip(together, alone):
        difference = np.asarray(one.image, np.int16) - np.asarray(other.image, np.int16)
        assert np.abs(difference).max() <= 1


def test_sdxl_and_a_picture_to_start_from_in_a_batch(loaded: Models, tmp_path: Path):
    init = next(loaded("sd1").paint("a cat", **KNOBS)).save(tmp_path / "init.png")
    for line, knobs in (("sdxl", {}), ("sd1", {"init": init}), ("sd1-inpainting", {"init": init})):
        model = loaded(line)

        together = list(model.paint("a cat", count=2, batch=2, **KNOBS | knobs))
        alone = [next(model.paint("a cat", **KNOBS | knobs | {"seed": seed})) for seed in (11, 12)]

        for one, other in zip(together, alone):
            difference = np.asarray(one.image, np.int16) - np.asarray(other.image, np.int16)
            assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a", "DPM++ 2M SDE"])
def test_the_same_request_twice_is_the_same_file_to_the_byte(sampler: str, loaded: Models, tmp_path: Path):
    files = []
    for name in ("one.png", "two.png"):
        files.append(next(loaded("sd1").paint("a cat", sampler=sampler, **KNOBS)).save(tmp_path / name))

    assert files[0].read_bytes() == files[1].read_bytes()


def test_pictures_come_one_by_one_and_stopping_paints_no_more(loaded: Models):
    steps: list[int] = []

    pictures = loaded("sd1").paint("a cat", count=5, on_step=lambda step: steps.append(step.index), **KNOBS)
    next(pictures)
    pictures.close()  # type: ignore[attr-defined]

    assert steps == [0, 1, 2]
