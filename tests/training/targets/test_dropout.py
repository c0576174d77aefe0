"""Dropouts: decided by the batch number, also when a module is evaluated twice; unbiased; off without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gouache import Model
from gouache.errors import RequestError
from gouache.training import checkpointing
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.dropout import ModuleDropout, Rates
from gouache.training.targets.options import AdapterOptions
from tests.marks import usual
from tests.training.targets.steps import loss, output, train, weights

MODULE = ("unet", "middle_block.1.proj_in")
RATES = {
    "module": ({"form": "lora"}, Rates(module=0.5)),
    "rank": ({"form": "lora"}, Rates(rank=0.5)),
    "value": ({"form": "locon"}, Rates(value=0.5)),
    "dora": ({"form": "dora"}, Rates(rank=0.3, value=0.3)),
    "loha": ({"form": "loha"}, Rates(rank=0.5, value=0.2)),
    "lokr": ({"form": "lokr"}, Rates(rank=0.5)),
    "oft": ({"form": "oft"}, Rates(rank=0.5)),
    "ia3": ({"form": "ia3"}, Rates(module=0.3, value=0.3)),
}


def gradients(model: Model, target: AdapterTarget, number: int) -> dict[str, Tensor]:
    target.adapter.zero_grad()
    target.begin_batch(number)
    loss(model).backward()
    return {
        name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in target.adapter.named_parameters()
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("case", usual(RATES, ("rank", "value", "module")))
def test_the_batch_number_alone_decides_also_under_gradient_checkpointing(case: str, models: Callable[[str], Model]):
    model = models("sd1")
    values, rates = RATES[case]
    options = AdapterOptions(**values, rank=4, parts=("unet", "text_encoder"), dropouts=rates)  # type: ignore[arg-type]
    target = AdapterTarget(model, options, seed=3)
    try:
        train(model, target, steps=2)  # so that the second factors are not zero
        first, second, again = (gradients(model, target, number) for number in (5, 6, 5))
        assert equal(first, again) and not equal(first, second)
        disable = [checkpointing.enable(network) for network in (model.unet, *model.text_encoders.values())]
        try:
            assert equal(first, gradients(model, target, 5))
        finally:
            for each in disable:
                each()
    finally:
        target.detach()


def test_dropouts_do_not_act_without_gradients(models: Callable[[str], Model]):
    model = models("sd1")
    plain = AdapterTarget(model, AdapterOptions(rank=4), seed=3)
    train(model, plain, steps=2)
    trained, expected = weights(plain), output(model)
    plain.detach()
    target = AdapterTarget(model, AdapterOptions(rank=4, dropouts=Rates(0.3, 0.3, 0.3)), seed=3)
    try:
        with torch.no_grad():
            for name, parameter in target.adapter.named_parameters():
                parameter.copy_(trained[f"adapter.{name}"])
        target.begin_batch(0)
        assert torch.equal(output(model), expected)  # under no_grad, as when painting and validating
        assert not torch.equal(loss(model).detach(), _without(target, model))
    finally:
        target.detach()


def _without(target: AdapterTarget, model: Model) -> Tensor:
    with torch.no_grad():
        return loss(model)


def test_a_skipped_module_gets_no_gradient(models: Callable[[str], Model]):
    model = models("sd1")
    target = AdapterTarget(model, AdapterOptions(rank=2, dropouts=Rates(module=0.5)), seed=0)
    try:
        target.begin_batch(0)
        loss(model).backward()
        shares = [float(p.grad is not None) for name, p in target.adapter.named_parameters() if "lora_up" in name]
        assert 0.2 < sum(shares) / len(shares) < 0.8
    finally:
        target.detach()


def test_the_mean_over_many_batches_is_the_value_without_dropout():
    parts = {"lora_down.weight": torch.ones(6, 3), "lora_up.weight": torch.ones(2, 6)}
    dropout = ModuleDropout(Rates(module=0.25, rank=0.4, value=0.2), 7, MODULE, parts)
    x = torch.ones(5, 6)
    skips, ranks, values = [], [], []
    for number in range(2000):
        dropout.begin_batch(number)
        skips.append(float(dropout.skips))
        ranks.append(dropout.of_parts(parts)["lora_down.weight"].mean(1))
        values.append(dropout.of_values(x))

    assert sum(skips) / len(skips) == pytest.approx(0.25, abs=0.04)
    torch.testing.assert_close(torch.stack(ranks).mean(0), torch.ones(6), atol=0.08, rtol=0)
    torch.testing.assert_close(torch.stack(values).mean(0), x, atol=0.06, rtol=0)
    torch.testing.assert_close(torch.stack(ranks).unique(), torch.tensor([0.0, 1 / 0.6]))
    assert torch.stack(values)[:, 0, 0].std() > 0.1  # between batches
    assert (torch.stack(values)[:, 0] != torch.stack(values)[:, 1]).any(1).float().mean() > 0.5  # and within one


def test_a_rank_that_is_left_out_contributes_nothing():
    parts = {"lora_down.weight": torch.randn(4, 3), "lora_up.weight": torch.randn(2, 4), "alpha": torch.tensor(4.0)}
    dropout = ModuleDropout(Rates(rank=0.5), 0, MODULE, parts)
    dropout.begin_batch(1)
    kept = dropout.of_parts(parts)["lora_down.weight"].abs().sum(1) > 0

    assert 0 < kept.sum() < 4
    expected = 2 * parts["lora_up.weight"][:, kept] @ parts["lora_down.weight"][kept]
    torch.testing.assert_close(parts["lora_up.weight"] @ dropout.of_parts(parts)["lora_down.weight"], expected)


@pytest.mark.parametrize(
    ("values", "message"), [({"module": 1.0}, "is 1; expected a prob"), ({"rank": -0.1}, "is -0.1")]
)
def test_impossible_probabilities_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        Rates(**values)
    with pytest.raises(RequestError, match="does not apply to ia3"):
        AdapterOptions(form="ia3", dropouts=Rates(rank=0.1))
