from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from gouache.diffusion.brownian import BrownianPath
from gouache.diffusion.noise import Noise, slerp
from gouache.diffusion.philox import NvGenerator, philox4x32
from gouache.errors import RequestError

SHAPE = (4, 6, 5)


def level(value: float) -> Tensor:
    return torch.tensor(value)


def test_cpu_noise_is_that_of_one_torch_generator_per_image():
    generator = torch.Generator().manual_seed(7)
    first, second, third = (torch.randn(SHAPE, generator=generator) for _ in range(3))

    noise = Noise([3, 7], SHAPE)

    assert torch.equal(noise.start()[1], first)
    assert torch.equal(noise.draw()[1], second)
    assert torch.equal(noise.draw()[1], third)
    assert torch.equal(noise.start()[1], first)


def test_nv_noise_is_that_of_torch_on_a_gpu():
    # torch.randn((3, 4), device="cuda") after manual_seed(0), as A1111's documentation of its generator prints it.
    published = torch.tensor(
        [
            [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
            [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
            [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
        ]
    )

    torch.testing.assert_close(NvGenerator(0).normal((3, 4)), published, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_matches_the_published_test_vectors(counter, key, words):
    output = philox4x32(np.array(counter, dtype=np.uint32).reshape(4, 1), np.array(key, dtype=np.uint32))

    assert output.ravel().tolist() == words


def test_the_counter_of_the_second_nv_tensor_has_its_number_and_the_element_index():
    """cuRAND's layout: the number of earlier tensors in counter word 0, the thread in word 2, the seed as the key."""
    seed, generator = 2**33 + 5, NvGenerator(2**33 + 5)
    generator.normal((7,))

    second = generator.normal((3,))

    counters = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 2], [0, 0, 0]], dtype=np.uint32)
    words = philox4x32(counters, np.array([seed % 2**32, seed // 2**32], dtype=np.uint32)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((words[0] + 0.5) / 2**32)), 2 * np.pi * (words[1] + 0.5) / 2**32
    np.testing.assert_allclose(second.numpy(), radius * np.sin(angle), rtol=1e-5, atol=1e-6)


def test_nv_seeds_use_all_64_bits():
    low, high = (Noise([seed], SHAPE, generator="nv").start() for seed in (5, 5 + 2**32))

    assert not torch.equal(low, high)
    assert not torch.equal(Noise([5], SHAPE, generator="nv").draw(), low)


@pytest.mark.parametrize("generator", ["cpu", "nv"])
def test_a_batch_equals_its_single_images_bit_for_bit(generator):
    settings = {"generator": generator, "variation_strength": 0.3, "ensd": 31337}
    seeds, others = [11, 12, 2**64 - 1], [1, 2, 3]
    pairs = [(14.6, 5.1), (5.1, 0.3), (0.3, 0.05)]

    batch = Noise(seeds, SHAPE, variation_seeds=others, **settings)
    singles = [Noise([seed], SHAPE, variation_seeds=[other], **settings) for seed, other in zip(seeds, others)]

    assert torch.equal(batch.start(), torch.cat([single.start() for single in singles]))
    for start, end in pairs:
        assert torch.equal(batch.draw(), torch.cat([single.draw() for single in singles]))
        expected = torch.cat([single.between(level(start), level(end)) for single in singles])
        assert torch.equal(batch.between(level(start), level(end)), expected)


def test_ensd_changes_only_the_samplers_noise():
    plain, shifted = Noise([7], SHAPE), Noise([7], SHAPE, ensd=100)

    assert torch.equal(shifted.start(), plain.start())
    assert torch.equal(shifted.draw(), Noise([107], SHAPE).start())
    assert torch.equal(shifted.between(level(3.0), level(1.0)), plain.between(level(3.0), level(1.0)))


def test_variations_interpolate_spherically_between_two_seeds():
    a, b = (Noise([seed], SHAPE).start()[0] for seed in (1, 2))
    others: dict = {"variation_seeds": [2]}

    assert torch.equal(Noise([1], SHAPE, variation_strength=0.0, **others).start()[0], a)
    torch.testing.assert_close(Noise([1], SHAPE, variation_strength=1.0, **others).start()[0], b)
    third = Noise([1], SHAPE, variation_strength=0.3, **others).start()[0]
    for channel in range(SHAPE[0]):  # each column of the latent is one vector
        for column in range(SHAPE[2]):
            start, end = (each[channel, :, column].double() for each in (a, b))
            angle = math.acos(start @ end / (start.norm() * end.norm()))
            parts = math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle)
            expected = parts[0] * start + parts[1] * end
            torch.testing.assert_close(third[channel, :, column].double(), expected, rtol=1e-4, atol=1e-5)


def test_between_parallel_latents_the_interpolation_is_linear():
    a = Noise([1], SHAPE).start()[0]

    torch.testing.assert_close(slerp(a, a * 1.5, 0.4), a * 1.2)


def test_increments_do_not_depend_on_earlier_queries():
    used, unused = BrownianPath(9, SHAPE), BrownianPath(9, SHAPE)
    for start, end in ((14.6, 0.03), (2.0, 1.9999), (4518.0, 700.0), (0.03, 0.0)):
        used.between(start, end)

    assert torch.equal(used.between(3.3, 1.1), unused.between(3.3, 1.1))
    assert torch.equal(used.between(1.1, 3.3), -unused.between(3.3, 1.1))


def test_increments_over_adjacent_intervals_add_up():
    path, levels = BrownianPath(9, SHAPE), [4518.0, 14.6, 9.7, 3.21, 0.4, 0.0292, 0.0]

    pieces = [path.between(a, b) * math.sqrt(a - b) for a, b in pairwise(levels)]

    whole = path.between(levels[0], levels[-1]) * math.sqrt(levels[0])
    torch.testing.assert_close(sum(pieces), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [(14.6, 9.7, 3.21), (0.3, 0.299, 0.298), (2.0, 1.0, 0.5), (4518.0, 700.0, 0.03)])
def test_increments_have_unit_variance_and_are_independent(levels):
    path = BrownianPath(21, (100_000,))

    first, second = path.between(levels[0], levels[1]), path.between(levels[1], levels[2])

    for increment in (first, second):  # standard errors: 0.003 for the mean, 0.0045 for the variance
        assert abs(float(increment.mean())) < 0.015
        assert abs(float(increment.var()) - 1) < 0.02
    assert abs(float((first * second).mean())) < 0.015


def test_paths_of_different_seeds_are_independent():
    increments = [BrownianPath(seed, (100_000,)).between(5.0, 3.0) for seed in (1, 2)]

    assert abs(float((increments[0] * increments[1]).mean())) < 0.015


def test_the_increment_between_equal_levels_is_zero():
    assert torch.equal(BrownianPath(1, SHAPE).between(2.0, 2.0), torch.zeros(SHAPE))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(RequestError, match=str(seed)):
        Noise([seed], SHAPE)


def test_a_wrong_number_of_variation_seeds_is_refused():
    with pytest.raises(RequestError, match="variation_seed: received 1 for a batch of 2"):
        Noise([1, 2], SHAPE, variation_seeds=[3], variation_strength=0.5)


def test_an_unknown_generator_is_named_in_the_error():
    with pytest.raises(RequestError, match="'gpu'"):
        Noise([1], SHAPE, generator="gpu")
