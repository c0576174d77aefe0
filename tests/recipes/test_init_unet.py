"""Initial weights of mini's U-Net, parts 1 and 2: whitened cross-attention, and channels with every cell's position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from recipes.mini import init_unet_positions, init_unet_whitening
from recipes.mini.init_unet_positions import PositionChannels

SPEC = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=16)


@pytest.fixture(scope="module")
def context() -> Tensor:
    """Contexts with a thousand times the variance along one direction as along another, and a common mean."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1.5, 16)
    return torch.randn(200, 7, 16, generator=generator) * scales + 3


@pytest.fixture(scope="module")
def unet(context: Tensor) -> UNet:
    torch.manual_seed(0)
    return init_unet_positions.initialise(init_unet_whitening.initialise(UNet(SPEC), context))


@torch.no_grad()
def test_all_directions_of_the_context_have_similar_gain(unet: UNet, context: Tensor):
    layer = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")

    gains = torch.linalg.svdvals(layer.to_v.weight @ torch.linalg.cholesky(torch.cov(context.flatten(0, 1).T)))
    random = torch.linalg.svdvals(torch.empty(128, 16).uniform_(-0.25, 0.25))

    assert gains[-1] > 0.3 * gains[0]  # as a random matrix has; without whitening it would be a thirtieth
    assert 0.5 < float(gains.mean() / random.mean()) < 2


@torch.no_grad()
def test_the_mean_context_is_subtracted(unet: UNet, context: Tensor):
    layer = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")

    out = layer.to_out(layer.to_v(context.flatten(0, 1).mean(0, keepdim=True)))

    usual = torch.nn.Linear(128, 128).bias
    assert out.abs().max() < usual.abs().max() + 1e-4  # only the layer's initial bias remains


@torch.no_grad()
def test_the_last_feature_map_holds_the_position_of_every_cell(unet: UNet):
    features: list[Tensor] = []
    hook = unet.out[0].register_forward_hook(lambda module, inputs, out: features.append(inputs[0]))

    unet(torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 7, 16))

    hook.remove()
    maps, positions = features[0][0], PositionChannels(32)
    assert torch.equal(maps[positions.one(4)], torch.ones(16, 16))
    cells = torch.arange(16).expand(16, 16)
    for axis, along in enumerate((cells, cells.T)):
        torch.testing.assert_close(maps[positions.ramp(axis)] * 16, along + 1.0)
        for level in range(4):
            torch.testing.assert_close(maps[positions.bit(level, axis)], 2.0 * (along // 2**level % 2) - 1)


@torch.no_grad()
def test_the_initial_output_is_zero(unet: UNet):
    assert not unet(torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 7, 16)).any()
