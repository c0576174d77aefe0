"""Weights moved to a mapped file: the same values, and no file that remains."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from gouache.training.mapped import to_disk


class Disk(NamedTuple):
    free: int


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 1)).bfloat16().requires_grad_(False)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.skipif(os.name != "posix", reason="files without a name cannot be mapped")
def test_moved_weights_are_the_same(tmp_path: Path) -> None:
    net, same = network(), network()
    before, x = dict(net.named_parameters()), torch.randn(1, 3, 6, 6).bfloat16()
    size = to_disk([net], tmp_path)
    assert size >= sum(each.nbytes for each in net.parameters())
    assert not list(tmp_path.iterdir())
    for name, weight in net.named_parameters():
        other = same.get_parameter(name)
        assert weight is before[name] and torch.equal(weight, other) and weight.stride() == other.stride()
    assert torch.equal(net(x), same(x))
    net.get_parameter("0.bias").fill_(1)  # a private copy of the page
    assert not torch.equal(net(x), same(x))


def test_nothing_is_moved_to_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any) -> Disk:
        return Disk(1000)

    monkeypatch.setattr(shutil, "disk_usage", full)
    net = network()
    addresses = [each.data_ptr() for each in net.parameters()]
    assert to_disk([net], tmp_path) == 0
    assert [each.data_ptr() for each in net.parameters()] == addresses
