"""Where the autoencoder starts from: a network that already blurs pictures instead of one that shows noise.

The same layers, with chosen weights: the encoder averages every 8x8 cell into whitened colours and one difference
of brightness across; the decoder interpolates between cells. Everything else begins silent and is learnt.

Group norm is what makes a narrow autoencoder slow to learn colour: it takes away each group's mean and scale. Two
habits make it a plain factor here. Colours travel as pairs (+c, -c) in one group, so the mean is zero, and SiLU loses
nothing: silu(c) - silu(-c) = c. And they travel at a scale far below the norm's eps, so its divisor stands still.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.vae import Autoencoder
from gouache.training.objective import Group

LATENT_SCALE = 0.18215  # SD1's: latents times this have about unit variance
STREAM = 1e-4  # the scale of what runs between the residual blocks
GAIN = 1e-6**0.5 / STREAM  # what a norm of eps 1e-6 divides by, over that scale
SPREAD = -5.0  # the log-variance that the encoder gives every latent cell


@dataclass(frozen=True)
class Colours:
    """How cell means become latents: (cells - mean) @ whiten.T; rows of `whiten` (3, 3) are axes of equal variance.

    `across` scales the fourth latent, the difference in brightness between a cell's left and right halves.
    """

    mean: Tensor
    whiten: Tensor
    across: float


BRIGHTNESS = torch.tensor([0.30, 0.59, 0.11])


def measure(images: Tensor) -> Colours:
    """The colours' statistics of a sample of pictures (B, 3, H, W) in [-1, 1]."""
    cells = F.avg_pool2d(images, 8).permute(1, 0, 2, 3).flatten(1).double()
    mean = cells.mean(1)
    values, axes = torch.linalg.eigh(torch.cov(cells))
    axes = axes.flip(1)  # brightest axis first
    axes = axes * axes.sum(0).sign()  # an axis has no sign of its own
    whiten = (axes / values.flip(0).sqrt()).T
    return Colours(mean.float(), whiten.float(), float(1 / _across(images).std()))


def latents(images: Tensor, colours: Colours) -> Tensor:
    """What the starting encoder's mean is, without running it: (B, 3, H, W) -> (B, 4, H/8, W/8), unscaled."""
    cells = F.avg_pool2d(images, 8) - colours.mean[:, None, None]
    colour = torch.einsum("kc,bchw->bkhw", colours.whiten, cells)
    return torch.cat([colour, colours.across * _across(images)], 1) / LATENT_SCALE


def shown(colours: Colours) -> Tensor:
    """(4,), of mean 1: how much an error of each latent should count, as the root of what it changes in the picture.

    A unit of the first changes colours 38 times as much, squared, as a unit of the fourth, which yet is hardest to
    tell: its errors, counted like the others', are most of the loss, and a small network learns little else.
    """
    of_colours = torch.linalg.inv(colours.whiten).pow(2).sum(0)
    of_halves = torch.tensor([3 * (0.5 / colours.across) ** 2])  # one half as much brighter as the other is darker
    roots = torch.cat([of_colours, of_halves]).sqrt()
    return roots / roots.mean()


def _across(images: Tensor) -> Tensor:
    bright = torch.einsum("c,bchw->bhw", BRIGHTNESS, images)[:, None]
    halves = F.avg_pool2d(bright, (8, 4))
    return halves[..., 0::2] - halves[..., 1::2]


@torch.no_grad()
def prepare(vae: Autoencoder, colours: Colours) -> None:
    """Set the weights of a freshly built autoencoder of equal widths, two channels a group."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(GAIN)
    for name, parameter in vae.named_parameters():
        if name.endswith("norm2.weight"):
            parameter.fill_(1.0)
        if _writes(name) or name.endswith(".bias"):
            parameter.zero_()
    _prepare_encoder(vae, colours)
    _prepare_decoder(vae, colours)


def _prepare_encoder(vae: Autoencoder, colours: Colours) -> None:
    encoder = vae.encoder
    encoder.conv_in.weight.mul_(STREAM)
    encoder.conv_in.weight[:8] = 0
    for colour in range(3):
        encoder.conv_in.weight[2 * colour, colour, 1, 1] = STREAM
        encoder.conv_in.weight[2 * colour + 1, colour, 1, 1] = -STREAM
    for level in encoder.down:
        if level.downsample is None:
            continue
        weight = level.downsample.conv.weight
        weight[:8] = 0
        for channel in range(6):
            weight[channel, channel, :2, :2] = 0.25
        for colour, share in enumerate(BRIGHTNESS.tolist()):
            # Only the last level's is read: there, the halves of an 8x8 cell lie side by side.
            weight[6, 2 * colour, :2, 0], weight[6, 2 * colour, :2, 1] = share / 2, -share / 2
            weight[7, 2 * colour, :2, 0], weight[7, 2 * colour, :2, 1] = -share / 2, share / 2
    out = encoder.conv_out
    out.weight.zero_()
    mix = torch.zeros(4, 4)
    mix[:3, :3], mix[3, 3] = colours.whiten, colours.across
    mix /= LATENT_SCALE
    out.weight[:4, 0:8:2, 1, 1] = mix
    out.weight[:4, 1:8:2, 1, 1] = -mix
    out.bias[:3] = -(colours.whiten @ colours.mean) / LATENT_SCALE
    out.bias[4:] = SPREAD
    vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])


def _prepare_decoder(vae: Autoencoder, colours: Colours) -> None:
    decoder = vae.decoder
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    decoder.conv_in.weight.copy_(torch.empty_like(decoder.conv_in.weight).uniform_(-1, 1, generator=_fixed()))
    decoder.conv_in.weight.mul_(STREAM * LATENT_SCALE / 3)
    decoder.conv_in.weight[:6] = 0
    back = torch.linalg.inv(colours.whiten) * LATENT_SCALE * STREAM
    decoder.conv_in.weight[0:6:2, :3, 1, 1] = back
    decoder.conv_in.weight[1:6:2, :3, 1, 1] = -back
    decoder.conv_in.bias[0:6:2] = colours.mean * STREAM
    decoder.conv_in.bias[1:6:2] = -colours.mean * STREAM
    tent = torch.tensor([0.25, 0.5, 0.25])
    for level in decoder.up:
        if level.upsample is None:
            continue
        weight = level.upsample.conv.weight
        weight[:6] = 0
        for channel in range(6):
            weight[channel, channel] = torch.outer(tent, tent)
    decoder.conv_out.weight.mul_(0.1)
    decoder.conv_out.weight[:, :6] = 0
    for colour in range(3):
        decoder.conv_out.weight[colour, 2 * colour, 1, 1] = 1
        decoder.conv_out.weight[colour, 2 * colour + 1, 1, 1] = -1


def groups(vae: Autoencoder, encoder: bool) -> list[Group]:
    """Parameters by rate: those that write into the stream learn at its scale, all others at the run's own.

    Without `encoder` only the decoder learns, so that cached latents stay what they are.
    """
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    if encoder:
        parts |= {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    named = {f"vae.{part}.{key}": value for part, module in parts.items() for key, value in module.named_parameters()}
    writes = {name: value for name, value in named.items() if _writes(name)}
    others = {name: value for name, value in named.items() if name not in writes}
    return [Group(writes, STREAM, decay=False), Group(others, decay=False)]


def _writes(name: str) -> bool:
    """Whether a parameter's output is added to the stream itself."""
    return ".conv2." in name or ".proj_out." in name or "sample.conv.bias" in name or ".conv_in." in name


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
