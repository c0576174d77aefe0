"""Patches of one module compared with the definitions, implemented independently in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gouache.adapters.patch import Patch
from gouache.errors import ModelError

Array = NDArray[np.float64]


def random(*shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


def patch(**parts: Array | float) -> Patch:
    return Patch({name.replace("__", "."): torch.tensor(np.asarray(value)) for name, value in parts.items()})


def changed(made: Patch, weight: Array, strength: float = 1.0) -> Array:
    # float64 throughout, so that only the definition is compared
    delta = made.delta()
    assert delta is not None and delta.dtype == torch.float64
    return made.weight(torch.from_numpy(weight), strength).double().numpy()


@pytest.mark.parametrize("alpha", [None, 0.0, 2.0, 8.0])
def test_lora_is_up_times_down_by_alpha_over_rank(alpha: float | None):
    weight, up, down = random((6, 5), (6, 4), (4, 5))
    alpha_part = {} if alpha is None else {"alpha": alpha}

    found = changed(patch(lora_up__weight=up, lora_down__weight=down, **alpha_part), weight, 0.7)

    scale = alpha / 4 if alpha else 1.0
    np.testing.assert_allclose(found, weight + 0.7 * scale * up @ down, atol=1e-5)


def test_a_convolutions_lora_applies_per_kernel_element():
    weight, up, down = random((6, 5, 3, 3), (6, 4, 1, 1), (4, 5, 3, 3))

    found = changed(patch(lora_up__weight=up, lora_down__weight=down, alpha=2.0), weight)

    expected = np.zeros_like(weight)
    for o, i, y, x in np.ndindex(weight.shape):
        expected[o, i, y, x] = sum(up[o, r, 0, 0] * down[r, i, y, x] for r in range(4)) * 2 / 4
    np.testing.assert_allclose(found, weight + expected, atol=1e-5)


def test_a_core_is_applied_between_up_and_down():
    weight, up, down, mid = random((6, 5, 3, 3), (6, 4, 1, 1), (4, 5, 1, 1), (4, 4, 3, 3))

    found = changed(patch(lora_up__weight=up, lora_down__weight=down, lora_mid__weight=mid, alpha=4.0), weight)

    # Equivalent to three consecutive convolutions: 1x1, 3x3, 1x1.
    x = torch.randn(1, 5, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stepwise = x
    for part, padding in ((down, 0), (mid, 1), (up, 0)):
        stepwise = torch.nn.functional.conv2d(stepwise, torch.from_numpy(part), padding=padding)
    at_once = torch.nn.functional.conv2d(x, torch.from_numpy(found - weight), padding=1)
    torch.testing.assert_close(at_once, stepwise, atol=1e-4, rtol=0)


def test_loha_multiplies_two_products_elementwise():
    weight, w1a, w1b, w2a, w2b = random((6, 5), (6, 3), (3, 5), (6, 3), (3, 5))

    made = patch(hada_w1_a=w1a, hada_w1_b=w1b, hada_w2_a=w2a, hada_w2_b=w2b, alpha=1.0)

    np.testing.assert_allclose(changed(made, weight), weight + (w1a @ w1b) * (w2a @ w2b) / 3, atol=1e-5)


def test_loha_with_cores():
    weight, w1a, w1b, w2a, w2b, t1, t2 = random(
        (6, 5, 3, 3), (3, 6), (3, 5), (3, 6), (3, 5), (3, 3, 3, 3), (3, 3, 3, 3)
    )

    made = patch(hada_w1_a=w1a, hada_w1_b=w1b, hada_w2_a=w2a, hada_w2_b=w2b, hada_t1=t1, hada_t2=t2)

    def product(core: Array, a: Array, b: Array) -> Array:
        return np.einsum("ijkl,jr,ip->prkl", core, b, a)

    np.testing.assert_allclose(changed(made, weight), weight + product(t1, w1a, w1b) * product(t2, w2a, w2b), atol=1e-5)


def test_lokr_is_a_kronecker_product():
    weight, w1, w2, w2a, w2b = random((6, 20), (2, 4), (3, 5), (3, 2), (2, 5))

    full = patch(lokr_w1=w1, lokr_w2=w2, alpha=7.0)
    factored = patch(lokr_w1=w1, lokr_w2_a=w2a, lokr_w2_b=w2b, alpha=1.0)

    np.testing.assert_allclose(changed(full, weight), weight + np.kron(w1, w2), atol=1e-5)  # alpha has no effect
    np.testing.assert_allclose(changed(factored, weight), weight + np.kron(w1, w2a @ w2b) / 2, atol=1e-5)


def test_lokr_of_a_convolution():
    weight, w1, w2 = random((6, 20, 3, 3), (2, 4), (3, 5, 3, 3))

    found = changed(patch(lokr_w1=w1, lokr_w2=w2), weight)

    for y, x in np.ndindex(3, 3):
        np.testing.assert_allclose(found[..., y, x], weight[..., y, x] + np.kron(w1, w2[..., y, x]), atol=1e-5)


@pytest.mark.parametrize("by_row", [True, False])
def test_dora_sets_the_norm_of_each_row_or_column(by_row: bool):
    weight, up, down = random((6, 5), (6, 4), (4, 5))
    magnitudes = np.abs(random((6, 1) if by_row else (1, 5), seed=1)[0])

    made = patch(lora_up__weight=up, lora_down__weight=down, dora_scale=magnitudes)
    found, half = changed(made, weight), changed(made, weight, 0.5)

    np.testing.assert_allclose(np.linalg.norm(found, axis=1 if by_row else 0, keepdims=True), magnitudes, atol=1e-5)
    updated = weight + up @ down
    cosines = (found * updated).sum() / np.linalg.norm(found * updated)
    assert cosines > 0
    np.testing.assert_allclose(half, (weight + found) / 2, atol=1e-5)


def test_pefts_dora_magnitude_has_one_value_per_row():
    weight, up, down = random((6, 5), (6, 4), (4, 5))
    magnitudes = np.abs(random((6,), seed=1)[0])

    found = changed(patch(lora_up__weight=up, lora_down__weight=down, dora_scale=magnitudes), weight)

    np.testing.assert_allclose(np.linalg.norm(found, axis=1), magnitudes, atol=1e-5)


def test_a_full_difference_includes_the_bias():
    weight, bias, diff, diff_b = random((6, 5), (6,), (6, 5), (6,))
    made = patch(diff=diff, diff_b=diff_b)

    np.testing.assert_allclose(changed(made, weight, 0.5), weight + 0.5 * diff, atol=1e-5)
    np.testing.assert_allclose(made.bias(torch.from_numpy(bias), 0.5).numpy(), bias + 0.5 * diff_b, atol=1e-5)


def test_shapes_that_do_not_fit_are_reported():
    weight, up, down = random((6, 7), (6, 4), (4, 5))

    with pytest.raises(ModelError, match=r"its delta is \[6, 5\], the weight is \[6, 7\]"):
        changed(patch(lora_up__weight=up, lora_down__weight=down), weight)
    with pytest.raises(ModelError, match=r"it is a LoRA without the part lora_down\.weight"):
        patch(lora_up__weight=up).delta()
    with pytest.raises(ModelError, match="match no known adapter form"):
        patch(nothing=up).delta()
