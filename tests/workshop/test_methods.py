"""Every merge method compared with its definition, reimplemented in numpy float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gouache.cli.merge import METHOD_NAMES
from gouache.workshop.methods import METHODS, Knobs, gaussian, median

Array = NDArray[np.float64]
SHAPES = [(7,), (6, 5), (4, 3, 3, 3), (1, 1)]


def models(count: int, shape: tuple[int, ...]) -> list[Array]:
    generator = np.random.default_rng([count, *shape])
    base = generator.standard_normal(shape)
    return [base + 0.3 * generator.standard_normal(shape) for _ in range(count)]


def merged_by(name: str, arrays: list[Array], knobs: Knobs) -> Array:
    # float64 inputs, so that the comparison tests the definition and not the rounding
    return METHODS[name].merge([torch.from_numpy(each) for each in arrays], knobs).numpy()


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def columns(a: Array) -> Array:
    return a.reshape(a.shape[0], -1)


def cosine_merge(a: Array, b: Array, whole: bool, alpha: float) -> Array:
    x, y = columns(a), columns(b)
    similarity = np.array([cosine(x[:, n], y[:, n]) for n in range(x.shape[1])])
    if whole:
        similarity = (similarity + cosine(a, b)) / 2
    weight = np.clip(similarity - alpha, 0, 1)
    return (weight * x + (1 - weight) * y).reshape(a.shape)


def slerp(a: Array, b: Array, alpha: float) -> Array:
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos(np.clip(cosine(a, b), -1, 1))
    if np.sin(angle) < 1e-3:
        return (1 - alpha) * a + alpha * b
    direction = (np.sin((1 - alpha) * angle) * a / length_a + np.sin(alpha * angle) * b / length_b) / np.sin(angle)
    return direction * ((1 - alpha) * length_a + alpha * length_b)


def train_difference(a: Array, b: Array, c: Array, alpha: float) -> Array:
    result = a.copy()
    for index in np.ndindex(a.shape):
        to_b, trained = abs(b[index] - a[index]), abs(b[index] - c[index])
        if to_b + trained:
            result[index] += 1.8 * alpha * to_b / (to_b + trained) * (b[index] - c[index])
    return result


def largest(delta: Array, density: float) -> Array:
    keep = int(np.ceil(density * delta.size))
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")[:keep]
    kept = np.zeros(delta.size)
    kept[order] = delta.ravel()[order]
    return kept.reshape(delta.shape)


def elected(deltas: list[Array]) -> Array:
    result = np.zeros_like(deltas[0])
    for index in np.ndindex(result.shape):
        sign = np.sign(sum(delta[index] for delta in deltas))
        agree = [delta[index] for delta in deltas if delta[index] and np.sign(delta[index]) == sign]
        result[index] = np.mean(agree) if agree else 0.0
    return result


def model_stock(base: Array, *tuned: Array) -> Array:
    deltas = [each - base for each in tuned]
    pairs = [cosine(x, y) for x, y in itertools.combinations(deltas, 2)]
    similarity, count = float(np.clip(np.mean(pairs), 0, 1)), len(tuned)
    ratio = count * similarity / (1 + (count - 1) * similarity)
    return ratio * np.mean(tuned, axis=0) + (1 - ratio) * base


def low_rank(delta: Array, rank: int) -> Array:
    if delta.ndim < 2:
        return delta
    u, s, v = np.linalg.svd(columns(delta), full_matrices=False)
    s[rank:] = 0
    return ((u * s) @ v).reshape(delta.shape)


DEFINITIONS: dict[str, tuple[int, Callable[..., Array]]] = {
    "weighted-sum": (2, lambda a, b: 0.7 * a + 0.3 * b),
    "add-difference": (3, lambda a, b, c: a + 0.3 * (b - c)),
    "sum-twice": (3, lambda a, b, c: 0.6 * (0.7 * a + 0.3 * b) + 0.4 * c),
    "triple-sum": (3, lambda a, b, c: 0.3 * a + 0.3 * b + 0.4 * c),
    "slerp": (2, lambda a, b: slerp(a, b, 0.3)),
    "cosine-a": (2, lambda a, b: cosine_merge(a, b, False, 0.3)),
    "cosine-b": (2, lambda a, b: cosine_merge(a, b, True, 0.3)),
    "train-difference": (3, lambda a, b, c: train_difference(a, b, c, 0.3)),
    "ties": (4, lambda base, *tuned: base + 0.3 * elected([largest(each - base, 0.2) for each in tuned])),
    "model-stock": (4, model_stock),
    "top-k": (3, lambda a, b, c: a + 0.3 * largest(b - c, 0.2)),
    "truncated-rank": (3, lambda a, b, c: a + 0.3 * low_rank(b - c, 2)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_method_matches_its_definition(name: str, shape: tuple[int, ...]):
    count, definition = DEFINITIONS[name]
    arrays = models(count, shape)

    merged = merged_by(name, arrays, Knobs(alpha=0.3, beta=0.4, density=0.2, rank=2))

    np.testing.assert_allclose(merged, definition(*arrays), atol=1e-6, rtol=0)


def test_only_methods_with_property_tests_lack_a_definition():
    assert METHODS.keys() - DEFINITIONS.keys() == {"smooth-add", "dare", "dropout", "della", "geometric-median"}


def test_the_commands_help_lists_all_methods():
    assert set(METHOD_NAMES) == METHODS.keys()


def neighbours(x: Array, index: tuple[int, ...]) -> list[float]:
    """The element and its neighbours, with reflected borders (the border element itself repeated)."""
    ranges = [[min(max(at + step, 0), n - 1) for step in (-1, 0, 1)] for at, n in zip(index, x.shape)]
    return [x[each] for each in itertools.product(*ranges)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_median_filter_takes_the_median_of_each_neighbourhood(shape: tuple[int, ...]):
    x = models(1, shape)[0]

    filtered = median(torch.from_numpy(x)).numpy()

    for index in np.ndindex(shape):
        assert filtered[index] == sorted(neighbours(x, index))[3 ** len(shape) // 2]


@pytest.mark.parametrize("shape", [*SHAPES, (12, 3)], ids=str)
def test_the_gaussian_filter_is_a_weighted_sum_with_reflected_borders(shape: tuple[int, ...]):
    x = models(1, shape)[0]
    kernel = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    kernel /= kernel.sum()

    expected = x
    for axis, length in enumerate(shape):
        indices = [int(n) if n < length else 2 * length - 1 - int(n) for n in np.arange(-4, length + 4) % (2 * length)]
        padded = np.moveaxis(expected, axis, -1)[..., indices]
        expected = np.moveaxis(np.stack([padded[..., n : n + 9] @ kernel for n in range(length)], -1), -1, axis)

    np.testing.assert_allclose(gaussian(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


def test_smooth_add_adds_the_filtered_difference():
    a, b, c = models(3, (6, 5))

    merged = merged_by("smooth-add", [a, b, c], Knobs(alpha=0.3))

    smooth = gaussian(median(torch.from_numpy(b - c))).numpy()
    np.testing.assert_allclose(merged, a + 0.3 * smooth, atol=1e-12)


@pytest.mark.parametrize("name", ["dare", "dropout", "della"])
def test_random_dropout_preserves_the_difference_on_average(name: str):
    base = np.zeros((50, 40))
    tuned = [np.abs(each) for each in models(2, (50, 40))]  # one sign, so that all agree
    runs = [merged_by(name, [base, *tuned], Knobs(alpha=1.0, density=0.5, seed=seed, name="w")) for seed in range(300)]

    if name == "dropout":
        np.testing.assert_allclose(np.mean(runs, axis=0), np.mean(tuned, axis=0), atol=0.3)
    zeros = [float((run == 0).mean()) for run in runs]
    assert 0.2 < np.mean(zeros) < 0.3  # both of two dropped, each with probability 0.5


@pytest.mark.parametrize("name", ["dare", "dropout", "della"])
def test_random_dropout_depends_on_seed_and_tensor_name_alone(name: str):
    arrays = models(3, (20, 10))
    run = lambda **knobs: merged_by(name, arrays, Knobs(density=0.5, **knobs))  # noqa: E731

    assert np.array_equal(run(seed=1, name="a"), run(seed=1, name="a"))
    assert not np.array_equal(run(seed=1, name="a"), run(seed=2, name="a"))
    assert not np.array_equal(run(seed=1, name="a"), run(seed=1, name="b"))


def test_della_drops_small_elements_more_often():
    delta = np.tile(np.linspace(0.1, 1, 100), (40, 1))
    arrays = [np.zeros_like(delta), delta, delta]
    runs = [
        merged_by("della", arrays, Knobs(alpha=1, density=0.5, epsilon=0.8, seed=seed, name="w")) for seed in range(20)
    ]
    kept = np.mean([run != 0 for run in runs], axis=(0, 1))

    assert kept[:20].mean() < 0.4 < 0.8 < kept[-20:].mean()


def test_the_geometric_median_has_the_least_sum_of_distances():
    arrays = models(5, (6, 5))
    arrays[0] += 100  # an outlier, which would pull a mean towards it
    found = merged_by("geometric-median", arrays, Knobs())
    total = lambda x: sum(np.linalg.norm(x - each) for each in arrays)  # noqa: E731
    generator = np.random.default_rng(0)

    assert all(total(found) <= total(found + 0.01 * generator.standard_normal(found.shape)) for _ in range(100))
    assert total(found) < total(np.mean(arrays, axis=0))


@pytest.mark.parametrize("name", METHODS)
def test_merging_equal_models_changes_nothing(name: str):
    fewest, _ = METHODS[name].inputs
    same = models(1, (6, 5)) * max(fewest, 2)

    merged = merged_by(name, same, Knobs(alpha=0.5, beta=0.5 if name != "triple-sum" else 0.2, density=0.5, name="w"))

    np.testing.assert_allclose(merged, same[0], atol=1e-9)
