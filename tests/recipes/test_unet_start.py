"""How the U-Net of `mini` starts: it hears every direction of its prompts alike, and knows where each cell lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from recipes.mini import listening, whereabouts
from recipes.mini.whereabouts import Channels

SPEC = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=16)


@pytest.fixture(scope="module")
def said() -> Tensor:
    """Contexts that say a thousand times as much along one direction as along another, and one thing always."""
    chance = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1.5, 16)
    return torch.randn(200, 7, 16, generator=chance) * scales + 3


@pytest.fixture(scope="module")
def unet(said: Tensor) -> UNet:
    torch.manual_seed(0)
    return whereabouts.prepare(listening.prepare(UNet(SPEC), said))


@torch.no_grad()
def test_every_direction_is_heard_alike(unet: UNet, said: Tensor):
    layer = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")

    spread = torch.linalg.svdvals(layer.to_v.weight @ torch.linalg.cholesky(torch.cov(said.flatten(0, 1).T)))
    fresh = torch.linalg.svdvals(torch.empty(128, 16).uniform_(-0.25, 0.25))

    assert spread[-1] > 0.3 * spread[0]  # a random matrix's own; without the whitening, a thirtieth of it
    assert 0.5 < float(spread.mean() / fresh.mean()) < 2


@torch.no_grad()
def test_what_is_always_said_is_taken_off(unet: UNet, said: Tensor):
    layer = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")

    out = layer.to_out(layer.to_v(said.flatten(0, 1).mean(0, keepdim=True)))

    plain = torch.nn.Linear(128, 128).bias
    assert out.abs().max() < plain.abs().max() + 1e-4  # the layer's own bias is all that is left


@torch.no_grad()
def test_the_last_maps_hold_the_place_of_every_cell(unet: UNet):
    seen: list[Tensor] = []
    hook = unet.out[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))

    unet(torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 7, 16))

    hook.remove()
    maps, places = seen[0][0], Channels(32)
    assert torch.equal(maps[places.one(4)], torch.ones(16, 16))
    cells = torch.arange(16).expand(16, 16)
    for axis, along in enumerate((cells, cells.T)):
        torch.testing.assert_close(maps[places.ramp(axis)] * 16, along + 1.0)
        for level in range(4):
            torch.testing.assert_close(maps[places.bit(level, axis)], 2.0 * (along // 2**level % 2) - 1)


@torch.no_grad()
def test_it_paints_nothing_yet(unet: UNet):
    assert not unet(torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 7, 16)).any()
