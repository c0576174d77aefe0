"""Masks of inpainting, and the channels made of them, compared with those that painting makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from gouache import Model
from gouache.generate.request import Request
from gouache.generate.source import read_source
from gouache.images import pixels
from gouache.model.inpainting import concat_channels
from gouache.training.inpainting import SHARES, draw_mask

from .data_sets import draw


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(64, 64), (128, 40), (8, 8), (1, 1), (512, 384)])
def test_masks_are_zero_or_one_and_repeatable(size: tuple[int, int]):
    for seed in range(40):
        mask = draw_mask(size, generator(seed))

        assert mask.shape == (1, size[1], size[0])
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(mask, draw_mask(size, generator(seed)))


def test_masks_cover_nothing_everything_and_much_between():
    areas = [float(draw_mask((96, 64), generator(seed)).mean()) for seed in range(600)]
    kinds = Counter("nothing" if area == 0 else "everything" if area == 1 else "part" for area in areas)

    assert abs(kinds["nothing"] / 600 - SHARES["nothing"]) < 0.03
    assert abs(kinds["everything"] / 600 - SHARES["everything"]) < 0.05
    parts = sorted(area for area in areas if 0 < area < 1)
    assert len(set(parts)) > 300
    assert parts[len(parts) // 10] < 0.15 and parts[-len(parts) // 10] > 0.4


def test_the_channels_are_those_that_painting_gives_the_network(loaded: Callable[[str], Model], tmp_path: Path):
    model = loaded("sd1-inpainting")
    init = draw(tmp_path / "init.png", (72, 64))
    mask = draw_mask((72, 64), generator(3))
    Image.fromarray(mask[0].mul(255).byte().numpy()).save(tmp_path / "mask.png")
    request = Request(init=init, mask=tmp_path / "mask.png")  # type: ignore[arg-type]

    with torch.no_grad():
        painted = read_source(model, request, (72, 64)).concat
        trained = concat_channels(model.encode, pixels.to_tensor([Image.open(init)]), mask[None])

    assert painted is not None and 0 < mask.mean() < 1
    assert torch.equal(trained, painted)


def test_what_is_masked_is_grey_before_it_is_encoded():
    seen = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images[:, :, ::8, ::8]

    pictures = torch.rand(2, 3, 16, 16) + 1
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, :, 8:] = 1

    channels = concat_channels(encode, pictures, masks)

    assert torch.equal(seen[0][1], pictures[1]) and torch.equal(seen[0][0, :, :, :8], pictures[0, :, :, :8])
    assert not seen[0][0, :, :, 8:].any()
    assert channels.shape == (2, 4, 2, 2)
    assert channels[0, 0].tolist() == [[0, 1], [0, 1]] and not channels[1, 0].any()
