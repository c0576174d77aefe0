"""Weights in half precision: trained through float32 copies as float32 weights are, or rounded without a bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gouache.errors import RequestError
from gouache.training import state
from gouache.training.loop import train
from gouache.training.objective import step_generator
from gouache.training.rounding import Masters, round_stochastically

from .toys import Regression, linear, points, settings


def half(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Regression:
    return Regression(linear(seed).to(dtype))


def in_half(number: int):
    return tuple(each.bfloat16() for each in points(number))


def test_stochastic_rounding_gives_a_neighbour_whose_mean_is_the_exact_value():
    exact = torch.tensor([1.0, 1.001, 1.0039, -3.3, 1e-20, 0.0])
    many = exact.repeat(20_000, 1)

    rounded = round_stochastically(many, step_generator(0, 0)).float()

    below = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((exact.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((rounded == below) | (rounded == above)).all())
    assert torch.equal(rounded[:, [0, 5]], many[:, [0, 5]])  # exactly representable
    error = (rounded.double().mean(0) - exact.double()).abs()
    assert bool((error <= 5 * (above - below).abs().double() * 0.5 / 20_000**0.5).all())


def test_infinity_and_nan_stay_what_they_are():
    found = round_stochastically(torch.tensor([torch.inf, -torch.inf, torch.nan]), step_generator(0, 0))

    assert torch.equal(found[:2], torch.tensor([torch.inf, -torch.inf]).bfloat16()) and bool(found[2].isnan())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_with_master_weights_are_those_of_adamw_in_float32_with_the_gradients_of_rounded_weights(
    tmp_path, accumulate
):
    net, copies = half().net, half().net.float()
    groups = [{"params": [copies.weight], "weight_decay": 0.01}, {"params": [copies.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.99))
    for step in range(6):
        for copied in copies.parameters():
            copied.grad = torch.zeros_like(copied)
        for number in range(step * accumulate, (step + 1) * accumulate):
            x, y = in_half(number)
            net.zero_grad()
            ((net(x) - y).pow(2).mean() / accumulate).backward()
            for copied, parameter in zip(copies.parameters(), net.parameters()):
                copied.grad += parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(copies.parameters(), 1.0)
        optimizer.step()
        net.load_state_dict(copies.state_dict())

    objective = half()
    result = train(objective, in_half, settings(learning_rate=1e-4, accumulate=accumulate), tmp_path)

    torch.testing.assert_close(result.last["net.weight"], copies.weight.detach())
    assert torch.equal(objective.net.weight, result.last["net.weight"].bfloat16())
    stored = state.newest(tmp_path)
    assert stored is not None and stored.tensors["weights"]["net.weight"].dtype == torch.float32


def moved(rounding: str, tmp_path) -> torch.Tensor:
    """How far 64 equal weights of 1 move in 400 steps of 1e-4 downwards, which are less than half their precision."""
    network = nn.Linear(64, 1, bias=False).bfloat16()
    with torch.no_grad():
        network.weight.fill_(1.0)
    x, y = torch.ones(1, 64).bfloat16(), torch.zeros(1, 1).bfloat16()
    chosen = settings(steps=400, optimizer="sgd", learning_rate=1e-4, clip_norm=0, rounding=rounding, weight_decay=0)
    objective = Slope(network)
    train(objective, lambda _: (x, y), chosen, tmp_path / rounding)
    return 1 - network.weight.detach().float()


class Slope(Regression):
    def losses(self, batch, number, /):
        return {"loss": self.net(batch[0]).sum()}  # a gradient of 1 for every weight


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_small_steps_add_up(tmp_path, rounding):
    distances = moved(rounding, tmp_path)

    assert float(distances.mean()) == pytest.approx(0.04, abs=0.004)
    # Rounded to nearest, not one of them would move.
    assert torch.equal(torch.tensor(1.0).bfloat16() - torch.tensor(1e-4).bfloat16(), torch.tensor(1.0).bfloat16())


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_half_precision_resumes_bit_equal(tmp_path, rounding, optimizer):
    chosen = {"rounding": rounding, "optimizer": optimizer, "accumulate": 2, "ema_decay": 0.9, "log_steps": 1}
    whole = train(half(), in_half, settings(**chosen), tmp_path / "whole")
    train(half(), in_half, settings(steps=2, **chosen), tmp_path / "parts")
    train(half(9), in_half, settings(steps=3, **chosen), tmp_path / "parts")
    parts = train(half(9), in_half, settings(**chosen), tmp_path / "parts")

    torch.testing.assert_close(dict(parts.last), dict(whole.last), rtol=0, atol=0)
    torch.testing.assert_close(dict(parts.weights), dict(whole.weights), rtol=0, atol=0)
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert whole.last["net.weight"].dtype == (torch.float32 if rounding == "master" else torch.bfloat16)


def test_the_rounding_may_change_on_resume(tmp_path):
    train(half(), in_half, settings(steps=2), tmp_path)
    train(half(9), in_half, settings(steps=4, rounding="stochastic"), tmp_path)

    assert train(half(9), in_half, settings(steps=6), tmp_path).finished


def test_float32_weights_have_no_copies():
    parameters = {"w": nn.Parameter(torch.ones(2)), "h": nn.Parameter(torch.ones(2, dtype=torch.float16))}

    masters = Masters(parameters, "master")

    assert masters.tensors["w"] is parameters["w"] and masters.tensors["h"].dtype == torch.float32


def test_copies_of_stochastic_rounding_exist_only_during_a_step():
    parameter = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    masters = Masters({"w": parameter}, "stochastic")
    parameter.grad = torch.ones_like(parameter)
    masters.collect()
    assert parameter.grad is None and masters.tensors["w"].grad is not None

    masters.store(seed=0, step=0)

    assert masters.tensors["w"].numel() == 0 and masters.tensors["w"].grad is None


def test_stochastic_rounding_of_float16_is_refused(tmp_path):
    with pytest.raises(RequestError, match="rounding: stochastic rounding is for bfloat16"):
        train(half(dtype=torch.float16), in_half, settings(rounding="stochastic"), tmp_path)
