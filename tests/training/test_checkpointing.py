"""Gradient checkpointing: gradients bit-equal, much less kept for the backward pass, nothing left afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gouache import Model
from gouache.training import checkpointing
from tests.pipelines import Narrow
from tests.training.targets.steps import FAMILIES, loader, loss


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    return loader(narrow)


def networks(model: Model) -> list[nn.Module]:
    return [model.unet, *model.text_encoders.values()]


def gradients(model: Model) -> tuple[dict[str, Tensor], int]:
    """(gradients by name, bytes that autograd keeps between the forward and the backward pass)."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for network in networks(model) for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for network in networks(model):
        network.requires_grad_(True).zero_grad()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(model)
        value.backward()
        found = {
            f"{index}.{name}": parameter.grad.clone()
            for index, network in enumerate(networks(model))
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }
    finally:
        for network in networks(model):
            network.zero_grad()
            network.requires_grad_(False)
    return found, sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_bit_equal_and_less_is_kept(family: str, models: Callable[[str], Model]):
    model = models(family)
    names = [list(network.state_dict()) for network in networks(model)]
    expected, plain = gradients(model)

    disable = [checkpointing.enable(network) for network in networks(model)]
    try:
        assert [list(network.state_dict()) for network in networks(model)] == names
        found, checkpointed = gradients(model)
    finally:
        for each in disable:
            each()

    assert found.keys() == expected.keys() and len(found) > 100
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert checkpointed < 0.5 * plain
    after, again = gradients(model)
    assert again == pytest.approx(plain, rel=0.05)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())


def test_enabling_twice_wraps_once(models: Callable[[str], Model]):
    unet = models("sd1").unet
    first, second = checkpointing.enable(unet), checkpointing.enable(unet)
    second()
    assert any("forward" in vars(module) for module in unet.modules())
    first()
    assert not any("forward" in vars(module) for module in unet.modules())


def test_without_gradients_blocks_are_evaluated_once(models: Callable[[str], Model]):
    model = models("sd1")
    with torch.no_grad():
        expected = loss(model)
    disable = checkpointing.enable(model.unet)
    try:
        with torch.inference_mode():
            assert torch.equal(loss(model), expected)
    finally:
        disable()
