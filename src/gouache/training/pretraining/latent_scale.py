"""The scale of an autoencoder's latents, which Stable Diffusion 1 fixes: 0.18215 times a latent has unit variance.

An autoencoder that was trained from nothing has latents of some other scale. A factor in its last and first
convolutions gives it this one, exactly: its reconstructions stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gouache.nn.vae import Autoencoder


@torch.no_grad()
def deviation(vae: Autoencoder, pictures: Iterable[Tensor]) -> float:
    """The standard deviation of sampled latents, in closed form: pictures (B, 3, H, W) in [-1, 1], of any sizes."""
    count, total, squares = 0, 0.0, 0.0
    for batch in pictures:
        moments = vae.encode(batch)
        mean, variance = moments.mean.double(), moments.logvar.double().exp()
        count += mean.numel()
        total += float(mean.sum())
        squares += float((mean.pow(2) + variance).sum())
    return math.sqrt(squares / count - (total / count) ** 2)


def scaled(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """`weights` of an autoencoder, by name, changed so that its latents are multiplied by `factor`.

    Means are multiplied, the logarithms of variances shifted by 2 ln(factor), and the decoder divides by it.
    """
    changed = dict(weights)
    quant, bias = weights["quant_conv.weight"].clone(), weights["quant_conv.bias"].clone()
    channels = len(bias) // 2
    quant[:channels] *= factor
    bias[:channels] *= factor
    bias[channels:] += 2 * math.log(factor)
    changed |= {"quant_conv.weight": quant, "quant_conv.bias": bias}
    changed["post_quant_conv.weight"] = weights["post_quant_conv.weight"] / factor
    return changed
