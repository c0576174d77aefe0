"""Batches of the latent cache: a function of their number, with every scene used REPEATS times."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gouache.diffusion.conditioning import Conditioning
from gouache.training.batch import Batch
from recipes.mini.latent_cache import LatentCache


def captioned(first: int, count: int) -> Batch:
    """Scenes whose latents, and contexts, are their numbers."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return Batch(numbers.view(-1, 1, 1, 1), Conditioning(numbers.view(-1, 1, 1)))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> LatentCache:
    monkeypatch.setattr(LatentCache, "SCENES", 128)
    return LatentCache(captioned, 32, seed=5)


def test_every_scene_is_used_repeatedly_and_keeps_its_caption(cache: LatentCache):
    batches = [cache(number) for number in range(2 * LatentCache.REPEATS * 4)]

    half = len(batches) // 2
    for first, part in ((0, batches[:half]), (128, batches[half:])):
        scenes = Counter(torch.cat([batch.latents for batch in part]).flatten().tolist())
        assert scenes == Counter(dict.fromkeys(range(first, first + 128), LatentCache.REPEATS))
    for batch in batches:
        assert torch.equal(batch.latents.flatten().bfloat16(), batch.conditioning.context.flatten().bfloat16())
    assert len({tuple(batch.latents.flatten().tolist()) for batch in batches}) == len(batches)


def test_a_batch_depends_on_its_number_alone(cache: LatentCache):
    forwards = [cache(number).latents for number in range(16)]
    backwards = [LatentCache(captioned, 32, seed=5)(number).latents for number in reversed(range(16))]

    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards)))
