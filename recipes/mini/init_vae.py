"""Initial weights of the autoencoder: it starts as a linear one that blurs pictures, instead of a random one.

The layers are unchanged; their weights are chosen. The encoder averages every 8x8 cell to a whitened colour and one
horizontal difference of brightness; the decoder interpolates between cells. Everything else starts at zero and is
learnt.

Group norm makes a narrow autoencoder slow to learn colour: it removes each group's mean and scale. Two conventions
reduce it to a constant factor here. Colours are stored as pairs (+c, -c) in one group, so the mean is zero, and SiLU
loses nothing: silu(c) - silu(-c) = c. And they are stored at a scale far below the norm's eps, so that its divisor is
nearly constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn.vae import Autoencoder
from gouache.training.objective import Group

LATENT_SCALE = 0.18215  # SD1's: latents times this have about unit variance
STREAM = 1e-4  # the scale of the residual stream
GAIN = 1e-6**0.5 / STREAM  # the divisor of a norm with eps 1e-6, relative to that scale
LOG_VARIANCE = -5.0  # what the encoder outputs for every latent cell


@dataclass(frozen=True)
class ColourStatistics:
    """How mean colours of cells map to latents: (cells - mean) @ whiten.T; `whiten` (3, 3) makes variances equal.

    `difference_scale` is the factor of the fourth latent, the difference in brightness of a cell's left and right half.
    """

    mean: Tensor
    whiten: Tensor
    difference_scale: float


LUMA = torch.tensor([0.30, 0.59, 0.11])


def measure(images: Tensor) -> ColourStatistics:
    """The statistics of pictures (B, 3, H, W) in [-1, 1]."""
    cells = F.avg_pool2d(images, 8).permute(1, 0, 2, 3).flatten(1).double()
    mean = cells.mean(1)
    values, axes = torch.linalg.eigh(torch.cov(cells))
    axes = axes.flip(1)  # brightest axis first
    axes = axes * axes.sum(0).sign()  # eigenvectors have an arbitrary sign: make the sum of each positive
    whiten = (axes / values.flip(0).sqrt()).T
    return ColourStatistics(mean.float(), whiten.float(), float(1 / _halves_difference(images).std()))


def latents(images: Tensor, colours: ColourStatistics) -> Tensor:
    """The initial encoder's mean in closed form, without running it: (B, 3, H, W) -> (B, 4, H/8, W/8), unscaled."""
    cells = F.avg_pool2d(images, 8) - colours.mean[:, None, None]
    colour = torch.einsum("kc,bchw->bkhw", colours.whiten, cells)
    return torch.cat([colour, colours.difference_scale * _halves_difference(images)], 1) / LATENT_SCALE


def channel_weights(colours: ColourStatistics) -> Tensor:
    """(4,), of mean 1: the weight of each latent's error, the RMS change of the picture per unit of the latent.

    A unit of the first latent changes the picture 38 times as much, squared, as a unit of the fourth, which is yet the
    hardest to predict: weighted equally, its errors are most of the loss, and a small network learns little else.
    """
    of_colours = torch.linalg.inv(colours.whiten).pow(2).sum(0)
    # One half gets brighter by as much as the other gets darker.
    of_difference = torch.tensor([3 * (0.5 / colours.difference_scale) ** 2])
    roots = torch.cat([of_colours, of_difference]).sqrt()
    return roots / roots.mean()


def _halves_difference(images: Tensor) -> Tensor:
    bright = torch.einsum("c,bchw->bhw", LUMA, images)[:, None]
    halves = F.avg_pool2d(bright, (8, 4))
    return halves[..., 0::2] - halves[..., 1::2]


@torch.no_grad()
def initialise(vae: Autoencoder, colours: ColourStatistics) -> None:
    """Set the weights of a newly built autoencoder with the same width at all levels and two channels per group."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(GAIN)
    for name, parameter in vae.named_parameters():
        if name.endswith("norm2.weight"):
            parameter.fill_(1.0)
        if _writes_to_stream(name) or name.endswith(".bias"):
            parameter.zero_()
    _initialise_encoder(vae, colours)
    _initialise_decoder(vae, colours)


def _initialise_encoder(vae: Autoencoder, colours: ColourStatistics) -> None:
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
        for colour, luma in enumerate(LUMA.tolist()):
            # Only the last level's output is used: there, the two halves of an 8x8 cell are neighbours.
            weight[6, 2 * colour, :2, 0], weight[6, 2 * colour, :2, 1] = luma / 2, -luma / 2
            weight[7, 2 * colour, :2, 0], weight[7, 2 * colour, :2, 1] = -luma / 2, luma / 2
    out = encoder.conv_out
    out.weight.zero_()
    mix = torch.zeros(4, 4)
    mix[:3, :3], mix[3, 3] = colours.whiten, colours.difference_scale
    mix /= LATENT_SCALE
    out.weight[:4, 0:8:2, 1, 1] = mix
    out.weight[:4, 1:8:2, 1, 1] = -mix
    out.bias[:3] = -(colours.whiten @ colours.mean) / LATENT_SCALE
    out.bias[4:] = LOG_VARIANCE
    vae.quant_conv.weight.copy_(torch.eye(8)[:, :, None, None])


def _initialise_decoder(vae: Autoencoder, colours: ColourStatistics) -> None:
    decoder = vae.decoder
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    decoder.conv_in.weight.copy_(torch.empty_like(decoder.conv_in.weight).uniform_(-1, 1, generator=_generator()))
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
    """Parameter groups: those that write to the residual stream get a learning rate of its scale, others the run's.

    Without `encoder` only the decoder is trained, so that cached latents stay valid.
    """
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    if encoder:
        parts |= {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    named = {f"vae.{part}.{key}": value for part, module in parts.items() for key, value in module.named_parameters()}
    writes = {name: value for name, value in named.items() if _writes_to_stream(name)}
    others = {name: value for name, value in named.items() if name not in writes}
    return [Group(writes, STREAM, decay=False), Group(others, decay=False)]


def _writes_to_stream(name: str) -> bool:
    """Whether a parameter's output is added to the residual stream."""
    return ".conv2." in name or ".proj_out." in name or "sample.conv.bias" in name or ".conv_in." in name


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
