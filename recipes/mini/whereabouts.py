"""How the U-Net starts: knowing where each cell lies.

Which thing a prompt names says what belongs where, so a cell must know its place. This network is told it by nothing
but the zeros around its maps, and a small one learns from them slowly: for thousands of steps every thing is a blob. So
the weights start as ones that pass a map of places along, in a few channels of the stream between the blocks:

    conv_in            a channel that is 1 everywhere, from its bias
    the last halving   on 2x2 cells: ramps across and down, 1/2 and 2/2, for a cell's left neighbour is 1 or padding
    each doubling      the ramp made finer, and whether a cell is the left or right (upper or lower) of its pair

Doubling repeats each cell, so r - left(r) is 1/n in the first cell of a pair and 0 in the second: at a map's left edge
too, where the padding goes on as the ramp would. All of it is linear; blocks add nothing until they have learnt to. At
16x16 (128 pixels) a cell has its four bits and its ramp, across and down. All of these weights are free to change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gouache.nn.blocks import Downsample, ResBlock, Upsample
from gouache.nn.unet import UNet

AXES = 2  # across, down


@dataclass(frozen=True)
class Channels:
    """Where in the stream the map of places stands: from `first` on, pairs of (across, down), then the constant.

    Bits and ramps of the two axes share the group of a group norm, of which two channels make one.
    """

    first: int

    def ramp(self, axis: int) -> int:
        return self.first + axis

    def bit(self, level: int, axis: int) -> int:
        """Which of its pair a cell is on the map of `level` (0 the finest)."""
        return self.first + AXES * (1 + level) + axis

    def one(self, levels: int) -> int:
        return self.first + AXES * (1 + levels)

    def all(self, levels: int) -> range:
        return range(self.first, self.one(levels) + 1)


@torch.no_grad()
def prepare(unet: UNet) -> UNet:
    """Set the weights of a freshly built U-Net whose residual branches start at zero."""
    levels = len(unet.spec.channel_mult)
    places = Channels(first=unet.spec.channels // 2)
    kept = list(places.all(levels))
    first = unet.input_blocks[0][0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    first.weight[kept] = 0
    first.bias[kept] = 0
    first.bias[places.one(levels)] = 1
    halvings = [layer for layer in unet.modules() if isinstance(layer, Downsample)]
    doublings = [layer for layer in unet.modules() if isinstance(layer, Upsample)]
    for layer in unet.modules():
        if isinstance(layer, ResBlock) and isinstance(layer.skip_connection, nn.Conv2d):
            _pass_on(layer.skip_connection, kept)
    for layer in halvings:
        _pass_on(layer.op, kept)
    for axis in range(AXES):
        _start(halvings[-1].op, places, levels, axis)
    for number, layer in enumerate(doublings):
        _pass_on(layer.conv, kept)
        for axis in range(AXES):
            _refine(layer.conv, places, levels, level=levels - 2 - number, axis=axis)
    return unet


def _middle(conv: nn.Conv2d) -> tuple[int, int]:
    return conv.kernel_size[0] // 2, conv.kernel_size[1] // 2


def _before(conv: nn.Conv2d, axis: int) -> tuple[int, int]:
    """The tap on the left neighbour, or on the upper one."""
    y, x = _middle(conv)
    return (y, x - 1) if axis == 0 else (y - 1, x)


def _set(conv: nn.Conv2d, out: int) -> Tensor:
    """The weights of one output channel, all zero now."""
    conv.weight[out] = 0
    if conv.bias is not None:
        conv.bias[out] = 0
    return conv.weight[out]


def _pass_on(conv: nn.Conv2d, channels: list[int]) -> None:
    """These channels go through as they are. Where maps are joined, they stand first in what comes from below."""
    for channel in channels:
        _set(conv, channel)[(channel, *_middle(conv))] = 1


def _start(conv: nn.Conv2d, places: Channels, levels: int, axis: int) -> None:
    """On two cells: ramp 1/2, 2/2; bit -1, +1."""
    one = places.one(levels)
    ramp = _set(conv, places.ramp(axis))
    ramp[(one, *_middle(conv))], ramp[(one, *_before(conv, axis))] = 0.5, 0.5
    bit = _set(conv, places.bit(levels - 1, axis))
    bit[(one, *_middle(conv))], bit[(one, *_before(conv, axis))] = -1, 2


def _refine(conv: nn.Conv2d, places: Channels, levels: int, level: int, axis: int) -> None:
    """After each cell was repeated: finer ramp r - (r - left(r)) / 2; bit 1 - 2 n (r - left(r)), n cells before."""
    ramp, one = places.ramp(axis), places.one(levels)
    cells = 2 ** (levels - 1 - level)
    fine = _set(conv, ramp)
    fine[(ramp, *_middle(conv))], fine[(ramp, *_before(conv, axis))] = 0.5, 0.5
    bit = _set(conv, places.bit(level, axis))
    bit[(one, *_middle(conv))] = 1
    bit[(ramp, *_middle(conv))], bit[(ramp, *_before(conv, axis))] = -2 * cells, 2 * cells
