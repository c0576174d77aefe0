"""Initial weights of the U-Net, part 3: it starts by drawing what the text encoder's layout tokens predict.

On the largest map of the decoder, each cell knows its position (`init_unet_positions`). So cross-attention starts by
looking up the layout token of the cell's patch: queries are the cell's position, keys the position code in a token. The
value returned describes the whole patch, and a feed-forward selects this cell's part of it: each gate opens in one of
the sixteen cells. There are three transformers on that map, and together they write the picture:

    the first    two of the four latents of things
    the second   the third latent, and alpha
    the third    the last latent, and the background's colour where alpha is 0
    out          a convolution, fitted by least squares, maps this picture and the noisy input to the training target

Everything else starts at zero, as before, and learns corrections. These weights are only a starting point and are
trained, except that cells of the largest map never attend to each other: that would be the most expensive part of a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.attention import SpatialTransformer, TransformerBlock
from gouache.nn.blocks import ResBlock, Upsample
from gouache.nn.unet import UNet
from recipes.mini.init_unet_positions import AXES, PositionChannels
from recipes.mini.layout_tokens import CELLS, FOREGROUND, LayoutHead

PICTURE_SCALE = 0.3  # the standard deviation of the picture's channels before a norm, where positions are +-1
VALUE_SCALE = 0.03  # the same of attended values among a transformer's channels, where positions are +-1
GATE = 4.0  # the pre-activation of a cell's gate: +GATE in its cell, at most -GATE elsewhere
BACKGROUND_GATE = 8.0  # the change of the background's gate per unit of alpha
ALPHA_SCALE = 0.25  # the scale of alpha among a transformer's channels
ATTENTION_SCALE = 14.0  # a cell's own patch gets exp(2 ATTENTION_SCALE / 8 ** 0.5) times the weight of a neighbour
PATCH_CELLS = CELLS * CELLS
CHANNELS_OF = ((0, 1), (2, 4), (3,))  # what each of the three transformers writes: latents 0..3, and 4 for alpha
ALPHA = FOREGROUND - 1


@torch.no_grad()
def initialise(unet: UNet, layout: LayoutHead) -> None:
    """Make a U-Net of 64 x (1, 1, 1, 2) draw what `layout` decodes; run the whitening and position parts before."""
    positions = PositionChannels(first=unet.spec.channels // 2)
    transformers = [layer for layer in unet.output_blocks.modules() if isinstance(layer, SpatialTransformer)]
    upsamples = [layer for layer in unet.output_blocks.modules() if isinstance(layer, Upsample)]
    largest = transformers[-3:]

    # The picture is stored twice, as itself and negated, each channel in a group with one that is 1 or -1 everywhere:
    # so the norms' divisors hardly depend on it, and in the end silu(c) - silu(-c) = c.
    picture = [2 * number for number in range(2 * FOREGROUND)]
    constants = [channel + 1 for channel in picture]
    conv = upsamples[-1].conv
    assert conv.bias is not None
    bit = positions.bit(0, 0)
    conv.weight[picture], conv.bias[picture] = 0.0, 0.0
    conv.weight[constants], conv.bias[constants] = conv.weight[bit].clone(), conv.bias[bit].clone()
    for block in list(unet.output_blocks)[-3:]:
        _pass_through(block, picture + constants)

    weight, bias = layout.draw.weight, layout.draw.bias
    foreground, background = weight[:-4].unflatten(0, (FOREGROUND, PATCH_CELLS)), (weight[-4:], bias[-4:])
    offsets = bias[:-4].unflatten(0, (FOREGROUND, PATCH_CELLS)).clone()
    # A norm subtracts a group's mean: alpha is stored as its difference from the mean alpha.
    mean_alpha = offsets[ALPHA].mean()
    offsets[ALPHA] -= mean_alpha
    for layer, channels in zip(largest, CHANNELS_OF):
        last = layer is largest[-1]
        builder = _TransformerBuilder(layer, positions, {picture[ALPHA]: ALPHA_SCALE} if last else {})
        builder.attend_to_patch(layout.place.weight)
        values = builder.read(torch.cat([foreground[kind] for kind in channels] + ([background[0]] if last else [])))
        for number, kind in enumerate(channels):
            patch_values = values[number * PATCH_CELLS : (number + 1) * PATCH_CELLS]
            builder.write_cell(patch_values, offsets[kind], picture[kind], picture[FOREGROUND + kind])
        if last:
            builder.write_background(values[-4:], background[1], picture, mean_alpha)


def disable_self_attention(unet: UNet) -> None:
    """Remove and freeze the self-attention of the largest map's transformers."""
    for name, block in unet.named_modules():
        if isinstance(block, TransformerBlock) and _is_largest(unet, name):
            for parameter in block.attn1.parameters():
                parameter.requires_grad_(False)
            _zero(block.attn1.to_out[0])
            block.attn1.forward = _no_attention


def _no_attention(x: Tensor, context: Tensor | None = None) -> Tensor:
    return x.new_zeros(())


def _is_largest(unet: UNet, name: str) -> bool:
    part, number = name.split(".")[:2]
    blocks = unet.spec.res_blocks
    if part == "input_blocks":
        return int(number) <= blocks
    return part == "output_blocks" and int(number) >= len(unet.output_blocks) - blocks - 1


class _TransformerBuilder:
    """Sets the weights of a transformer whose channels are some channels of its map, and attended values in others.

    The norm before the gates subtracts a token's mean and divides by its deviation. To keep both nearly constant, the
    map's channels are stored twice, as themselves and negated, and attended values are small next to the positions,
    which are +-1: the norm then multiplies by `scale`.
    """

    def __init__(self, layer: SpatialTransformer, positions: PositionChannels, others: Mapping[int, float]) -> None:
        block = layer.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        self.layer, self.block = layer, block
        self.width = block.norm3.normalized_shape[0]
        # Finer levels first and x before y, the order of `patch_codes` and of a patch's cells.
        bits = [positions.bit(level, axis) for level in range(4) for axis in range(AXES)]
        self.cell_bits, self.patch_bits = bits[:4], bits[4:]
        factors = dict.fromkeys(bits, 1.0) | dict(others)
        free = [channel for channel in range(self.width) if channel not in factors]
        self.free = free[len(factors) :]
        self.scale = (self.width / (2 * len(bits))) ** 0.5
        _zero(layer.proj_in)
        for (channel, factor), negated in zip(factors.items(), free):
            layer.proj_in.weight[channel, channel] = factor
            layer.proj_in.weight[negated, channel] = -factor
        _zero(block.attn1.to_out[0])
        _zero(block.attn2.to_out[0])
        self.gates, self.output = block.ff.net[0].proj, block.ff.net[2]
        self.inner = self.gates.weight.shape[0] // 2
        self.used = 0
        self.values: list[int] = []
        _zero(self.gates)
        _zero(self.output)
        _zero(layer.proj_out)

    def attend_to_patch(self, code: Tensor) -> None:
        """Make every head attend to the token whose position code, read by `code` (4, width), is this cell's patch."""
        attention = self.block.attn2
        head_width = self.width // attention.heads
        attention.to_q.weight.zero_()
        attention.to_k.weight.zero_()
        for head in range(attention.heads):
            for number, bit in enumerate(self.patch_bits):
                attention.to_q.weight[head * head_width + number, bit] = ATTENTION_SCALE**0.5 / self.scale
                attention.to_k.weight[head * head_width + number] = ATTENTION_SCALE**0.5 * code[number]

    def read(self, weight: Tensor) -> list[int]:
        """Store VALUE_SCALE * `weight` (n, width) @ token in n free channels; returns the channels."""
        count = len(weight)
        self.values, self.free = self.free[:count], self.free[count:]
        value, out = self.block.attn2.to_v, self.block.attn2.to_out[0]
        value.weight[:count] = VALUE_SCALE * weight
        for index, channel in enumerate(self.values):
            out.weight[channel, index] = 1
        return self.values

    def write_cell(self, values: Sequence[int], offset: Tensor, target: int, negated: int) -> None:
        """Write, of a patch's `values` (+ `offset`, one per cell), the one of this cell to the map."""
        written = self._free_channel()
        opened = F.gelu(torch.tensor(GATE)).item()
        for cell, channel in enumerate(values):
            row = self._next_row()
            self._set_value(row, channel, offset[cell])
            y, x = divmod(cell, CELLS)
            signs = (2 * (x % 2) - 1, 2 * (y % 2) - 1, 2 * (x // 2) - 1, 2 * (y // 2) - 1)
            for bit, sign in zip(self.cell_bits, signs):
                self.gates.weight[self.inner + row, bit] = GATE * sign / self.scale
            self.gates.bias[self.inner + row] = -GATE * (len(self.cell_bits) - 1)
            self.output.weight[written, row] = 1 / opened
        self._write(written, target, negated)

    def write_background(
        self, values: Sequence[int], offset: Tensor, picture: Sequence[int], mean_alpha: Tensor
    ) -> None:
        """Write the background `values` (+ `offset`) times (1 - alpha); alpha is stored less `mean_alpha`.

        alpha * background is about gelu(BACKGROUND_GATE alpha) background / BACKGROUND_GATE; a negative alpha gives 0,
        which is even better.
        """
        # The norm before the transformer maps a group of PICTURE_SCALE * c and +-1 to c * PICTURE_SCALE * 2 ** 0.5.
        gain = BACKGROUND_GATE / (PICTURE_SCALE * 2**0.5 * ALPHA_SCALE)
        for index, channel in enumerate(values):
            target, negated = picture[index], picture[FOREGROUND + index]
            row, covered = self._next_row(), self._free_channel()
            self._set_value(row, channel, offset[index])
            self.gates.weight[self.inner + row, picture[ALPHA]] = gain / self.scale
            self.gates.bias[self.inner + row] = BACKGROUND_GATE * mean_alpha
            self.output.weight[covered, row] = -1 / BACKGROUND_GATE
            self._write(covered, target, negated)
            for out, sign in ((target, 1), (negated, -1)):
                self.layer.proj_out.weight[out, channel] += sign * PICTURE_SCALE / VALUE_SCALE
                self.layer.proj_out.bias[out] += sign * PICTURE_SCALE * offset[index]

    def _next_row(self) -> int:
        self.used += 1
        return self.used - 1

    def _free_channel(self) -> int:
        return self.free.pop(0)

    def _set_value(self, row: int, channel: int, offset: Tensor) -> None:
        """Make a hidden unit's value the attended value in `channel`, + `offset`."""
        # The norm subtracts the mean over the channels, to which the attended values contribute: add that back.
        self.gates.weight[row, self.values] = 1 / (self.width - len(self.values)) / (self.scale * VALUE_SCALE)
        self.gates.weight[row, channel] += 1 / (self.scale * VALUE_SCALE)
        self.gates.bias[row] = offset

    def _write(self, source: int, target: int, negated: int) -> None:
        """Add a channel of the transformer to two channels of the map, negated to the second."""
        self.layer.proj_out.weight[target, source] += PICTURE_SCALE
        self.layer.proj_out.weight[negated, source] -= PICTURE_SCALE


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _pass_through(block: nn.Module, channels: Sequence[int]) -> None:
    """Make the block's skip connection the identity on these channels."""
    for layer in block.modules():
        if isinstance(layer, ResBlock):
            skip = layer.skip_connection
            assert isinstance(skip, nn.Conv2d) and skip.bias is not None
            skip.weight[list(channels)] = 0
            skip.bias[list(channels)] = 0
            for channel in channels:
                skip.weight[channel, channel, 0, 0] = 1


@torch.no_grad()
def fit_output_conv(unet: UNet, batches: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]], count: int) -> None:
    """Fit the last convolution by least squares to `count` batches (x, t, context, the network's target)."""
    conv = unet.out[2]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    inputs = conv.weight[0].numel()
    products = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
    sums = torch.zeros(inputs + 1, conv.weight.shape[0], dtype=torch.float64)
    features: list[Tensor] = []
    hook = unet.out[1].register_forward_hook(lambda module, inputs, output: features.append(output))
    for number in range(count):
        x, t, context, target = batches(number)
        unet(x, t, context)
        patches = F.unfold(features.pop(), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
        products += patches.T @ patches
        sums += patches.T @ target.permute(0, 2, 3, 1).flatten(0, 2).double()
    hook.remove()
    ridge = 1e-4 * products.diagonal().mean() * torch.eye(inputs + 1, dtype=torch.float64)
    weights = torch.linalg.solve(products + ridge, sums).T.float()
    conv.weight.copy_(weights[:, :-1].unflatten(1, conv.weight.shape[1:]))
    conv.bias.copy_(weights[:, -1])
