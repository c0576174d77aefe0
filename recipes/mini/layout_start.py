"""How the U-Net starts: already laying out, in blurs, what the text tower says of the picture.

The text tower's states, averaged, are a picture in code (`layout`): things, what they cover, the ground's colour. A
U-Net could learn to read that code, but slowly: only products of what is said and where a cell lies make shapes, and
those it finds late. So it begins with weights that form them, in small steps:

    at 4x4      what is said, gated: a feed-forward's gates open in one of the 16 cells each, by the map of places
    8x8, 16x16  each doubling spreads codes over finer cells, by its convolution
    at 16x16    things + ground - cover * ground: a feed-forward again, whose gates open as far as a cell is covered
    out         four channels are the picture; a convolution fitted by least squares makes of them what is to be told

All else is silent as before and learns to correct. What stands here is where training starts, free to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.attention import SpatialTransformer, TransformerBlock
from gouache.nn.blocks import ResBlock, Upsample
from gouache.nn.unet import UNet
from recipes.mini.whereabouts import AXES, Channels

CELLS = 16  # of the 4x4 map
UNITS = 16  # codes that one transformer writes: its 256 gated units, shared by the cells
HEARD = 40  # directions of what is said that one transformer reads: its 64 channels without places and codes
FINER = 20  # codes of a cell at 8x8
DRAWN = 5  # what is drawn at 16x16: four channels of things, one of cover
QUIET = 0.3  # the standard deviation of what is drawn before a norm, where places are 1
SOFT = 0.03  # the same of what is said among a transformer's tokens, where places are 1
GATE = 4.0  # how far a gate of a cell stands above, or below, nothing
STEEP = 8.0  # how much a gate of the ground opens by a cover of 1
FAINT = 0.25  # of the cover among a transformer's tokens
STEPS = 1500


@dataclass(frozen=True)
class Said:
    """What averaged states s (width) say, through z = `whiten` (s - `mean`), which has unit variance.

    Things and cover are `drawn` (K, 5, 16, 16) times z + `drawn_base`, the ground `ground` (K, 4) times z +
    `ground_base`; the picture is things + (1 - cover) * ground.
    """

    whiten: Tensor  # (K, width)
    mean: Tensor
    drawn: Tensor
    drawn_base: Tensor
    ground: Tensor
    ground_base: Tensor


def said(layout: nn.Linear, states: Tensor) -> Said:
    """By the text stage's own layer, and the averaged `states` (B, width) of a sample of captions."""
    mean = states.mean(0)
    values, axes = torch.linalg.eigh(torch.cov(states.T.double()))
    kept = values > 1e-4 * values.max()
    spread = (axes[:, kept] * values[kept].sqrt()).float()
    whiten = (axes[:, kept] / values[kept].sqrt()).T.float()
    weight, base = layout.weight.detach() @ spread, layout.weight.detach() @ mean + layout.bias.detach()
    side = math.isqrt((len(base) - 4) // DRAWN)
    return Said(
        whiten,
        mean,
        weight[:-4].T.unflatten(1, (DRAWN, side, side)),
        base[:-4].unflatten(0, (DRAWN, side, side)),
        weight[-4:].T,
        base[-4:],
    )


@dataclass(frozen=True)
class Drawing:
    """How z (K) becomes things and cover: `heard` (T, HEARD, K) and `codes` (T, CELLS, UNITS, HEARD) of T transformers,
    `base` (CELLS, T * UNITS) the codes of what is said on average, and the kernels of two doublings.
    """

    heard: Tensor
    codes: Tensor
    base: Tensor
    first: Tensor
    second: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """(B, K) -> (B, DRAWN, 16, 16)."""
        codes = torch.einsum("tpuh,thk,bk->bptu", self.codes, self.heard, z).flatten(2) + self.base
        maps = codes.transpose(1, 2).unflatten(2, (4, 4))
        for kernel in (self.first, self.second):
            maps = F.conv2d(F.interpolate(maps, scale_factor=2.0), kernel, padding=1)
        return maps


def fit(told: Said, transformers: int = 3, seed: int = 0) -> Drawing:
    """The drawing that comes nearest to what is `told`."""
    chances = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=chances) * scale).requires_grad_()

    kinds, count = len(told.drawn), transformers * UNITS
    drawing = Drawing(
        heard=normal(transformers, HEARD, kinds, scale=kinds**-0.5),
        codes=normal(transformers, CELLS, UNITS, HEARD, scale=HEARD**-0.5),
        base=normal(CELLS, count, scale=1.0),
        first=normal(FINER, count, 3, 3, scale=(9 * count) ** -0.5),
        second=normal(DRAWN, FINER, 3, 3, scale=(9 * FINER) ** -0.5),
    )
    parts = [drawing.heard, drawing.codes, drawing.base, drawing.first, drawing.second]
    optimizer = torch.optim.Adam(parts, lr=1e-2)
    points = torch.cat([torch.eye(kinds), torch.zeros(1, kinds)])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / STEPS)) / 2
        found = drawing(points)
        base = found[-1]
        error = (found[:-1] - base - told.drawn).pow(2).sum() + (base - told.drawn_base).pow(2).sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    # Directions of unit length at right angles, so that what is heard is as loud along each.
    heard, codes, *rest = (part.detach() for part in parts)
    across, mixed = torch.linalg.qr(heard.transpose(1, 2))
    return Drawing(across.transpose(1, 2), torch.einsum("tpuh,tjh->tpuj", codes, mixed), *rest)


@torch.no_grad()
def prepare(unet: UNet, told: Said, drawing: Drawing) -> None:
    """Put both into a U-Net of 64 x (1, 1, 1, 2) that `listening` and `whereabouts` prepared."""
    levels = len(unet.spec.channel_mult)
    places = Channels(first=unet.spec.channels // 2)
    kept = list(places.all(levels))
    free = [channel for channel in range(unet.spec.channels) if channel not in kept]
    blocks = list(unet.output_blocks)
    transformers = [layer for block in blocks for layer in block.modules() if isinstance(layer, SpatialTransformer)]
    doublings = [layer for block in blocks for layer in block.modules() if isinstance(layer, Upsample)]
    codes, finer = free[: drawing.base.shape[1]], free[:FINER]

    bits = [places.bit(level, axis) for level in (levels - 2, levels - 1) for axis in range(AXES)]
    for number in range(len(drawing.heard)):
        _tell(transformers[number], told, drawing, number, bits, codes[number * UNITS : (number + 1) * UNITS])
    at_4, at_8, at_16 = (blocks[3 * level : 3 * level + 3] for level in (1, 2, 3))
    for number, block in enumerate(at_4):
        _pass_on(block, codes if number else [], silent=codes)
    for block in at_8:
        _pass_on(block, finer, silent=finer)
    _spread(doublings[1].conv, drawing.first, codes, finer)

    # What is drawn stands twice, as itself and negated, each in one group with a channel that is 1 or -1 everywhere:
    # so the norms' divisors hardly depend on it, and of silu(c) - silu(-c) in the end only c is left.
    drawn = [2 * number for number in range(2 * DRAWN)]
    carriers = [channel + 1 for channel in drawn]
    _spread(doublings[2].conv, QUIET * torch.cat([drawing.second, -drawing.second]), finer, drawn)
    conv = doublings[2].conv
    assert conv.bias is not None
    finest = places.bit(0, 0)
    conv.weight[carriers], conv.bias[carriers] = conv.weight[finest].clone(), conv.bias[finest].clone()
    for block in at_16:
        _pass_on(block, drawn + carriers, silent=drawn + carriers)
    _compose(transformers[6], told, drawn, places)


class _Tokens:
    """A transformer whose tokens are some channels of its map, and what is said in others.

    The norm before the gates takes off a token's mean and divides by its deviation. So that both are much the same
    everywhere, the channels of the map stand there twice, as themselves and negated, and what is said is quiet beside
    the places, which are plus or minus 1: the norm multiplies by `size`.
    """

    def __init__(self, layer: SpatialTransformer, places: Sequence[int], others: Mapping[int, float]) -> None:
        block = layer.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        self.layer, self.block = layer, block
        self.width = block.norm3.normalized_shape[0]
        factors = dict.fromkeys(places, 1.0) | dict(others)
        free = [channel for channel in range(self.width) if channel not in factors]
        self.free = free[len(factors) :]
        self.size = (self.width / (2 * len(places))) ** 0.5
        _silence(layer.proj_in)
        for (channel, factor), negated in zip(factors.items(), free):
            layer.proj_in.weight[channel, channel] = factor
            layer.proj_in.weight[negated, channel] = -factor
        _silence(block.attn1.to_out[0])
        _silence(block.attn2.to_out[0])
        # Keys that are all alike: attention that averages.
        block.attn2.to_k.weight.zero_()
        self.gates, self.narrow = block.ff.net[0].proj, block.ff.net[2]
        self.inner = self.gates.weight.shape[0] // 2
        _silence(self.gates)
        _silence(self.narrow)
        _silence(layer.proj_out)

    def hear(self, weight: Tensor, mean: Tensor) -> list[int]:
        """Have `weight` (n, width) times (the average of what is said - `mean`) in n channels, SOFT times; which."""
        count = len(weight)
        channels, self.free = self.free[:count], self.free[count:]
        value, out = self.block.attn2.to_v, self.block.attn2.to_out[0]
        value.weight[:count] = SOFT * weight
        for index, channel in enumerate(channels):
            out.weight[channel, index] = 1
        out.bias[channels] = -value.weight[:count] @ mean
        return channels

    def value(self, row: int, heard: Sequence[int], weight: Tensor, base: Tensor) -> None:
        """Make a unit's value `weight` (n) times what is heard, + `base`."""
        # The norm takes off what is heard on average over the channels: w (c - mean c) is to be as without.
        whole = weight + weight.sum() / (self.width - len(heard))
        self.gates.weight[row, list(heard)] = whole / (self.size * SOFT)
        self.gates.bias[row] = base

    def write(self, source: int, target: int, factor: float = 1.0) -> None:
        """Add a channel of the tokens to one of the map."""
        self.layer.proj_out.weight[target, source] += factor


def _tell(
    layer: SpatialTransformer, told: Said, drawing: Drawing, number: int, bits: Sequence[int], out: Sequence[int]
) -> None:
    """Make a transformer at 4x4 write its codes to the channels `out`."""
    tokens = _Tokens(layer, bits, {})
    heard = tokens.hear(drawing.heard[number] @ told.whiten, told.mean)
    written = tokens.free[:UNITS]
    opened = F.gelu(torch.tensor(GATE)).item()
    for cell in range(CELLS):
        y, x = divmod(cell, 4)
        # As `bits` are ordered: the finer level first, across before down.
        signs = [2 * (x % 2) - 1, 2 * (y % 2) - 1, 2 * (x // 2) - 1, 2 * (y // 2) - 1]
        for unit in range(UNITS):
            row = cell * UNITS + unit
            tokens.value(row, heard, drawing.codes[number, cell, unit], drawing.base[cell, number * UNITS + unit])
            for bit, sign in zip(bits, signs):
                tokens.gates.weight[tokens.inner + row, bit] = GATE * sign / tokens.size
            tokens.gates.bias[tokens.inner + row] = -GATE * (len(bits) - 1)
            tokens.narrow.weight[written[unit], row] = 1 / opened
    for source, target in zip(written, out):
        tokens.write(source, target)


def _compose(layer: SpatialTransformer, told: Said, drawn: Sequence[int], places: Channels) -> None:
    """Make a transformer at 16x16 add the ground to the things, where nothing covers it.

    cover * ground = gelu(STEEP cover) ground / STEEP, nearly, and for a cover below nothing 0, which is better still.
    """
    cover = drawn[DRAWN - 1]
    bits = [places.bit(level, axis) for level in range(2) for axis in range(AXES)]
    tokens = _Tokens(layer, bits, {cover: FAINT})
    ground = tokens.hear(told.ground.T @ told.whiten, told.mean)
    covered = tokens.free[: len(ground)]
    # The norm before the tokens makes of a group of QUIET * c and of 1 or -1: c times QUIET * 2 ** 0.5.
    loud = STEEP / (QUIET * 2**0.5 * FAINT)
    for index, axis in enumerate(torch.eye(len(ground))):
        tokens.value(index, ground, axis, told.ground_base[index])
        tokens.gates.weight[tokens.inner + index, cover] = loud / tokens.size
        tokens.narrow.weight[covered[index], index] = 1 / STEEP
        for target, sign in ((drawn[index], 1), (drawn[DRAWN + index], -1)):
            tokens.write(ground[index], target, sign * QUIET / SOFT)
            tokens.write(covered[index], target, -sign * QUIET)
            layer.proj_out.bias[target] = sign * QUIET * told.ground_base[index]


def _silence(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _pass_on(block: nn.Module, channels: Sequence[int], silent: Sequence[int]) -> None:
    """Let these channels through the block's shortcut as they are, and nothing else into the `silent` ones."""
    for layer in block.modules():
        if isinstance(layer, ResBlock):
            shortcut = layer.skip_connection
            assert isinstance(shortcut, nn.Conv2d) and shortcut.bias is not None
            shortcut.weight[list(silent)] = 0
            shortcut.bias[list(silent)] = 0
            for channel in channels:
                shortcut.weight[channel, channel, 0, 0] = 1


def _spread(conv: nn.Conv2d, kernel: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    assert conv.bias is not None
    conv.weight[list(targets)] = 0
    conv.bias[list(targets)] = 0
    conv.weight[torch.tensor(targets)[:, None], torch.tensor(sources)] = kernel


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
