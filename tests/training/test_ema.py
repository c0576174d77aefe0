"""The moving average compared with its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gouache.training.ema import Ema
from gouache.training.loop import train

from .toys import points, regression, settings


def test_the_average_is_the_weighted_sum_of_all_weights_so_far():
    parameter = nn.Parameter(torch.tensor([10.0, -2.0]))
    ema = Ema({"w": parameter}, decay=0.5)
    history = [torch.tensor([10.0, -2.0], dtype=torch.float64)]
    for step in range(1, 31):
        with torch.no_grad():
            parameter.copy_(torch.tensor([float(step**2), 1.0 / step]))
        history.append(parameter.detach().double())
        ema.update({"w": parameter})

    # Each update multiplies the average by d: the k-th weights keep the share (1 - d_k) times all later d.
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(1, 31)]
    expected = torch.zeros(2, dtype=torch.float64)
    for k, weights in enumerate(history):
        share = 1.0 if k == 0 else 1 - decays[k - 1]
        for later in decays[k:]:
            share *= later
        expected += share * weights
    torch.testing.assert_close(ema.weights["w"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_decay_increases_to_its_limit():
    parameter = nn.Parameter(torch.zeros(()))
    ema = Ema({"w": parameter}, decay=0.9)
    shares = []
    for _ in range(200):
        ema.weights["w"].fill_(1.0)
        ema.update({"w": parameter})
        shares.append(float(ema.weights["w"]))

    assert shares[:3] == pytest.approx([2 / 11, 3 / 12, 4 / 13])
    assert shares[-1] == pytest.approx(0.9)
    assert shares == sorted(shares)


def test_averages_of_half_precision_weights_are_float32():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, decay=0.999)
    for _ in range(2000):
        with torch.no_grad():
            parameter.fill_(1.0078125)  # the next bfloat16 after 1
        ema.update({"w": parameter})

    assert ema.weights["w"].dtype == torch.float32
    assert 1.004 < float(ema.weights["w"][0]) <= 1.0078125


def test_the_gap_is_the_distance_as_a_share_of_the_norm():
    weights = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    ema = Ema({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, 0.9)
    assert ema.gap(weights) == pytest.approx(1.0)

    ema.start(weights)
    assert ema.gap(weights) == 0
    assert ema.gap({"a": torch.zeros(2), "b": torch.zeros(1, 1)}) == 0  # a norm of 0 has no share
    ema.weights["b"] += 0.5

    assert ema.gap(weights) == pytest.approx(0.1)


def test_averages_of_half_precision_weights_are_float32_and_can_be_on_the_cpu():
    ema = Ema({"a": torch.ones(2, dtype=torch.bfloat16)}, 0.999, on_cpu=True)

    ema.update({"a": torch.full((2,), 1.0078125, dtype=torch.bfloat16)})

    assert ema.weights["a"].dtype == torch.float32 and ema.weights["a"].device.type == "cpu"
    torch.testing.assert_close(ema.weights["a"], torch.full((2,), 1 + 0.0078125 * (1 - 2 / 11)))


def test_a_run_with_averages_on_the_cpu_is_the_same(tmp_path):
    result = train(regression(), points, settings(ema_decay=0.9, ema_on_cpu=True), tmp_path / "found")
    expected = train(regression(), points, settings(ema_decay=0.9), tmp_path / "expected")

    torch.testing.assert_close(dict(result.weights), dict(expected.weights), rtol=0, atol=0)
