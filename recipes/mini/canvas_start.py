"""How the U-Net starts: already laying out what the text tower's canvas tells.

On the largest map, going up, each cell knows where it lies (`whereabouts`). So its cross-attention begins by looking up
the canvas token of its patch: queries are the cell's place, keys what a token says of its own. What comes back tells
the whole patch, and a feed-forward takes of it what is this cell's: its gates open in one of the sixteen cells each.
Three transformers stand on that map, and between them they say the picture:

    the first    two of the four latents of things
    the second   the third, and how far things cover the ground
    the third    the last, and the ground's colour where it is not covered
    out          a convolution fitted by least squares makes of picture and noisy input what is to be told

All else is silent as before and learns to correct. What stands here is where training starts, free to change; but the
cells of the largest map attend to no other cell, then or later: of all that a step costs, that would be the most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.attention import SpatialTransformer, TransformerBlock
from gouache.nn.blocks import ResBlock, Upsample
from gouache.nn.unet import UNet
from recipes.mini.canvas import CELLS, DRAWN, Canvas
from recipes.mini.whereabouts import AXES, Channels

QUIET = 0.3  # the standard deviation of what is drawn before a norm, where places are 1
SOFT = 0.03  # the same of what is heard among a transformer's tokens, where places are 1
GATE = 4.0  # how far a gate of a cell stands above, or below, nothing
STEEP = 8.0  # how much a gate of the ground opens by a cover of 1
FAINT = 0.25  # of the cover among a transformer's tokens
LOOK = 14.0  # how much louder a cell hears its own patch than its neighbour: exp of 2 LOOK / 8 ** 0.5
INSIDE = CELLS * CELLS
SHARES = ((0, 1), (2, 4), (3,))  # what each of the three transformers takes: latents 0..3, and 4 the cover
COVER = DRAWN - 1


@torch.no_grad()
def prepare(unet: UNet, canvas: Canvas) -> None:
    """Have a U-Net of 64 x (1, 1, 1, 2) that `listening` and `whereabouts` prepared draw what `canvas` would."""
    places = Channels(first=unet.spec.channels // 2)
    transformers = [layer for layer in unet.output_blocks.modules() if isinstance(layer, SpatialTransformer)]
    doublings = [layer for layer in unet.output_blocks.modules() if isinstance(layer, Upsample)]
    finest = transformers[-3:]

    # What is drawn stands twice, as itself and negated, each in one group with a channel that is 1 or -1 everywhere:
    # so the norms' divisors hardly depend on it, and of silu(c) - silu(-c) in the end only c is left.
    drawn = [2 * number for number in range(2 * DRAWN)]
    carriers = [channel + 1 for channel in drawn]
    conv = doublings[-1].conv
    assert conv.bias is not None
    bit = places.bit(0, 0)
    conv.weight[drawn], conv.bias[drawn] = 0.0, 0.0
    conv.weight[carriers], conv.bias[carriers] = conv.weight[bit].clone(), conv.bias[bit].clone()
    for block in list(unet.output_blocks)[-3:]:
        _pass_on(block, drawn + carriers)

    weight, bias = canvas.draw.weight, canvas.draw.bias
    inside, ground = weight[:-4].unflatten(0, (DRAWN, INSIDE)), (weight[-4:], bias[-4:])
    level = bias[:-4].unflatten(0, (DRAWN, INSIDE)).clone()
    # A norm takes a group's mean off: the cover stands there as how much more is covered than usual.
    usual = level[COVER].mean()
    level[COVER] -= usual
    for layer, share in zip(finest, SHARES):
        last = layer is finest[-1]
        tokens = _Tokens(layer, places, {drawn[COVER]: FAINT} if last else {})
        tokens.look(canvas.place.weight)
        heard = tokens.hear(torch.cat([inside[kind] for kind in share] + ([ground[0]] if last else [])))
        for number, kind in enumerate(share):
            of_kind = heard[number * INSIDE : (number + 1) * INSIDE]
            tokens.pick(of_kind, level[kind], drawn[kind], drawn[DRAWN + kind])
        if last:
            tokens.fill(heard[-4:], ground[1], drawn, usual)


def hush(unet: UNet) -> None:
    """Leave out the attention of the largest map's cells to each other, now and while the U-Net learns."""
    for name, block in unet.named_modules():
        if isinstance(block, TransformerBlock) and _is_largest(unet, name):
            for parameter in block.attn1.parameters():
                parameter.requires_grad_(False)
            _silence(block.attn1.to_out[0])
            block.attn1.forward = _nothing


def _nothing(x: Tensor, context: Tensor | None = None) -> Tensor:
    return x.new_zeros(())


def _is_largest(unet: UNet, name: str) -> bool:
    part, number = name.split(".")[:2]
    blocks = unet.spec.res_blocks
    if part == "input_blocks":
        return int(number) <= blocks
    return part == "output_blocks" and int(number) >= len(unet.output_blocks) - blocks - 1


class _Tokens:
    """A transformer whose tokens are some channels of its map, and what is heard in others.

    The norm before the gates takes off a token's mean and divides by its deviation. So that both are much the same
    everywhere, the channels of the map stand there twice, as themselves and negated, and what is heard is quiet beside
    the places, which are plus or minus 1: the norm multiplies by `size`.
    """

    def __init__(self, layer: SpatialTransformer, places: Channels, others: Mapping[int, float]) -> None:
        block = layer.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        self.layer, self.block = layer, block
        self.width = block.norm3.normalized_shape[0]
        # Finer levels first, and across before down, as a patch's cells and `codes` are counted.
        bits = [places.bit(level, axis) for level in range(4) for axis in range(AXES)]
        self.within, self.patch = bits[:4], bits[4:]
        factors = dict.fromkeys(bits, 1.0) | dict(others)
        free = [channel for channel in range(self.width) if channel not in factors]
        self.free = free[len(factors) :]
        self.size = (self.width / (2 * len(bits))) ** 0.5
        _silence(layer.proj_in)
        for (channel, factor), negated in zip(factors.items(), free):
            layer.proj_in.weight[channel, channel] = factor
            layer.proj_in.weight[negated, channel] = -factor
        _silence(block.attn1.to_out[0])
        _silence(block.attn2.to_out[0])
        self.gates, self.narrow = block.ff.net[0].proj, block.ff.net[2]
        self.inner = self.gates.weight.shape[0] // 2
        self.used = 0
        self.heard: list[int] = []
        _silence(self.gates)
        _silence(self.narrow)
        _silence(layer.proj_out)

    def look(self, place: Tensor) -> None:
        """Have every head attend to the token that says, through `place` (4, width), where this cell's patch is."""
        attention = self.block.attn2
        wide = self.width // attention.heads
        attention.to_q.weight.zero_()
        attention.to_k.weight.zero_()
        for head in range(attention.heads):
            for number, bit in enumerate(self.patch):
                attention.to_q.weight[head * wide + number, bit] = LOOK**0.5 / self.size
                attention.to_k.weight[head * wide + number] = LOOK**0.5 * place[number]

    def hear(self, weight: Tensor) -> list[int]:
        """Have `weight` (n, width) times what the token says in n channels, SOFT times; which."""
        count = len(weight)
        self.heard, self.free = self.free[:count], self.free[count:]
        value, out = self.block.attn2.to_v, self.block.attn2.to_out[0]
        value.weight[:count] = SOFT * weight
        for index, channel in enumerate(self.heard):
            out.weight[channel, index] = 1
        return self.heard

    def pick(self, heard: Sequence[int], level: Tensor, target: int, negated: int) -> None:
        """Draw of the patch that is `heard` (+ `level`, of as many cells) what is this cell's."""
        written = self._unit()
        opened = F.gelu(torch.tensor(GATE)).item()
        for cell, channel in enumerate(heard):
            row = self._row()
            self._value(row, channel, level[cell])
            y, x = divmod(cell, CELLS)
            for bit, sign in zip(self.within, (2 * (x % 2) - 1, 2 * (y % 2) - 1, 2 * (x // 2) - 1, 2 * (y // 2) - 1)):
                self.gates.weight[self.inner + row, bit] = GATE * sign / self.size
            self.gates.bias[self.inner + row] = -GATE * (len(self.within) - 1)
            self.narrow.weight[written, row] = 1 / opened
        self._write(written, target, negated)

    def fill(self, heard: Sequence[int], level: Tensor, drawn: Sequence[int], usual: Tensor) -> None:
        """Draw the ground that is `heard` (+ `level`), but not where it is covered (+ `usual`).

        cover * ground = gelu(STEEP cover) ground / STEEP, nearly, and for a cover below nothing 0, which is better
        still.
        """
        # The norm before the tokens makes of a group of QUIET * c and of 1 or -1: c times QUIET * 2 ** 0.5.
        loud = STEEP / (QUIET * 2**0.5 * FAINT)
        for index, channel in enumerate(heard):
            target, negated = drawn[index], drawn[DRAWN + index]
            row, covered = self._row(), self._unit()
            self._value(row, channel, level[index])
            self.gates.weight[self.inner + row, drawn[COVER]] = loud / self.size
            self.gates.bias[self.inner + row] = STEEP * usual
            self.narrow.weight[covered, row] = -1 / STEEP
            self._write(covered, target, negated)
            for out, sign in ((target, 1), (negated, -1)):
                self.layer.proj_out.weight[out, channel] += sign * QUIET / SOFT
                self.layer.proj_out.bias[out] += sign * QUIET * level[index]

    def _row(self) -> int:
        self.used += 1
        return self.used - 1

    def _unit(self) -> int:
        return self.free.pop(0)

    def _value(self, row: int, channel: int, level: Tensor) -> None:
        """Make a unit's value what is heard in one channel, + `level`."""
        # The norm takes off what is heard on average over the channels: c - mean c is to be as without.
        self.gates.weight[row, self.heard] = 1 / (self.width - len(self.heard)) / (self.size * SOFT)
        self.gates.weight[row, channel] += 1 / (self.size * SOFT)
        self.gates.bias[row] = level

    def _write(self, source: int, target: int, negated: int) -> None:
        """Add a channel of the tokens to two of the map."""
        self.layer.proj_out.weight[target, source] += QUIET
        self.layer.proj_out.weight[negated, source] -= QUIET


def _silence(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _pass_on(block: nn.Module, channels: Sequence[int]) -> None:
    """Let these channels through the block's shortcut as they are, and nothing else into them."""
    for layer in block.modules():
        if isinstance(layer, ResBlock):
            shortcut = layer.skip_connection
            assert isinstance(shortcut, nn.Conv2d) and shortcut.bias is not None
            shortcut.weight[list(channels)] = 0
            shortcut.bias[list(channels)] = 0
            for channel in channels:
                shortcut.weight[channel, channel, 0, 0] = 1


@torch.no_grad()
def read_out(unet: UNet, batches: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]], count: int) -> None:
    """Fit the last convolution by least squares to `count` batches (x, t, context, what the network is to say)."""
    conv = unet.out[2]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    inputs = conv.weight[0].numel()
    products = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
    sums = torch.zeros(inputs + 1, conv.weight.shape[0], dtype=torch.float64)
    seen: list[Tensor] = []
    hook = unet.out[1].register_forward_hook(lambda module, given, made: seen.append(made))
    for number in range(count):
        x, t, context, wanted = batches(number)
        unet(x, t, context)
        patches = F.unfold(seen.pop(), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
        products += patches.T @ patches
        sums += patches.T @ wanted.permute(0, 2, 3, 1).flatten(0, 2).double()
    hook.remove()
    ridge = 1e-4 * products.diagonal().mean() * torch.eye(inputs + 1, dtype=torch.float64)
    weights = torch.linalg.solve(products + ridge, sums).T.float()
    conv.weight.copy_(weights[:, :-1].unflatten(1, conv.weight.shape[1:]))
    conv.bias.copy_(weights[:, -1])
