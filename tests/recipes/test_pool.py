"""Batches out of a pool: a function of their number, each scene as often as it is said."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gouache.diffusion.conditioning import Conditioning
from gouache.training.denoising import Captioned
from recipes.mini.pool import Pool


def captioned(first: int, count: int) -> Captioned:
    """Scenes whose latents, and contexts, are their numbers."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return Captioned(numbers.view(-1, 1, 1, 1), Conditioning(numbers.view(-1, 1, 1)))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(Pool, "SCENES", 128)
    return Pool(captioned, 32, seed=5)


def test_each_scene_comes_as_often_as_it_is_said_and_with_its_own_caption(pool: Pool):
    batches = [pool(number) for number in range(2 * Pool.AGAIN * 4)]

    half = len(batches) // 2
    for first, part in ((0, batches[:half]), (128, batches[half:])):
        scenes = Counter(torch.cat([batch.latents for batch in part]).flatten().tolist())
        assert scenes == Counter(dict.fromkeys(range(first, first + 128), Pool.AGAIN))
    for batch in batches:
        assert torch.equal(batch.latents.flatten().bfloat16(), batch.said.context.flatten().bfloat16())
    assert len({tuple(batch.latents.flatten().tolist()) for batch in batches}) == len(batches)


def test_a_batch_depends_on_its_number_alone(pool: Pool):
    forwards = [pool(number).latents for number in range(16)]
    backwards = [Pool(captioned, 32, seed=5)(number).latents for number in reversed(range(16))]

    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards)))
