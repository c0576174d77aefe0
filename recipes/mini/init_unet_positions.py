"""Initial weights of the U-Net, part 2: channels that hold the position of every cell.

Which thing a prompt names determines what belongs where, so a cell needs to know its position. A U-Net can infer it
only from the zero padding of its feature maps, and a small one learns that slowly: for thousands of steps every thing
is a blob. So the weights start such that a few channels of the residual stream carry position maps:

    conv_in               a channel that is 1 everywhere, from its bias
    the last Downsample   on 2x2 cells: ramps along x and y, 1/2 and 2/2, since a cell's left neighbour is 1 or padding
    each Upsample         the ramp refined, and whether a cell is the left or right (upper or lower) one of its pair

Upsampling repeats each cell, so r - left(r) is 1/n in the first cell of a pair and 0 in the second; at a map's left
edge too, where the padding continues the ramp. All of it is linear, and blocks add nothing at first. At 16x16 cells
(128 pixels) a cell has its four bits and its ramp, along x and y. All of these weights are trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gouache.nn.blocks import Downsample, ResBlock, Upsample
from gouache.nn.unet import UNet

AXES = 2  # x, y


@dataclass(frozen=True)
class PositionChannels:
    """Indices of the position channels: from `first` on, pairs of (x, y), then the constant.

    Bits or ramps of the two axes share a group of the group norm, which has two channels per group.
    """

    first: int

    def ramp(self, axis: int) -> int:
        return self.first + axis

    def bit(self, level: int, axis: int) -> int:
        """Whether a cell is the second of its pair on the map of `level` (0 is the finest)."""
        return self.first + AXES * (1 + level) + axis

    def one(self, levels: int) -> int:
        return self.first + AXES * (1 + levels)

    def all(self, levels: int) -> range:
        return range(self.first, self.one(levels) + 1)


@torch.no_grad()
def initialise(unet: UNet) -> UNet:
    """Set the weights of a newly built U-Net whose residual branches start at zero."""
    levels = len(unet.spec.channel_mult)
    positions = PositionChannels(first=unet.spec.channels // 2)
    channels = list(positions.all(levels))
    first = unet.input_blocks[0][0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    first.weight[channels] = 0
    first.bias[channels] = 0
    first.bias[positions.one(levels)] = 1
    downsamples = [layer for layer in unet.modules() if isinstance(layer, Downsample)]
    upsamples = [layer for layer in unet.modules() if isinstance(layer, Upsample)]
    for layer in unet.modules():
        if isinstance(layer, ResBlock) and isinstance(layer.skip_connection, nn.Conv2d):
            _pass_through(layer.skip_connection, channels)
    for layer in downsamples:
        _pass_through(layer.op, channels)
    for axis in range(AXES):
        _write_coarsest(downsamples[-1].op, positions, levels, axis)
    for number, layer in enumerate(upsamples):
        _pass_through(layer.conv, channels)
        for axis in range(AXES):
            _refine(layer.conv, positions, levels, level=levels - 2 - number, axis=axis)
    return unet


def _centre(conv: nn.Conv2d) -> tuple[int, int]:
    return conv.kernel_size[0] // 2, conv.kernel_size[1] // 2


def _previous(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    """The kernel's tap on the left neighbour (axis 0) or the upper one (axis 1)."""
    y, x = _centre(conv)
    return (y, x - 1) if axis == 0 else (y - 1, x)


def _cleared(conv: nn.Conv2d, out: int) -> Tensor:
    """The weights of one output channel, after setting them and its bias to zero."""
    conv.weight[out] = 0
    if conv.bias is not None:
        conv.bias[out] = 0
    return conv.weight[out]


def _pass_through(conv: nn.Conv2d, channels: list[int]) -> None:
    """Make the convolution the identity on these channels; in concatenated maps, those of the decoder come first."""
    for channel in channels:
        _cleared(conv, channel)[(channel, *_centre(conv))] = 1


def _write_coarsest(conv: nn.Conv2d, positions: PositionChannels, levels: int, axis: int) -> None:
    """On two cells: ramp 1/2, 2/2; bit -1, +1."""
    one = positions.one(levels)
    ramp = _cleared(conv, positions.ramp(axis))
    ramp[(one, *_centre(conv))], ramp[(one, *_previous(conv, axis))] = 0.5, 0.5
    bit = _cleared(conv, positions.bit(levels - 1, axis))
    bit[(one, *_centre(conv))], bit[(one, *_previous(conv, axis))] = -1, 2


def _refine(conv: nn.Conv2d, positions: PositionChannels, levels: int, level: int, axis: int) -> None:
    """After upsampling from n cells: finer ramp r - (r - left(r)) / 2; bit 1 - 2 n (r - left(r))."""
    ramp, one = positions.ramp(axis), positions.one(levels)
    cells = 2 ** (levels - 1 - level)
    fine = _cleared(conv, ramp)
    fine[(ramp, *_centre(conv))], fine[(ramp, *_previous(conv, axis))] = 0.5, 0.5
    bit = _cleared(conv, positions.bit(level, axis))
    bit[(one, *_centre(conv))] = 1
    bit[(ramp, *_centre(conv))], bit[(ramp, *_previous(conv, axis))] = -2 * cells, 2 * cells
