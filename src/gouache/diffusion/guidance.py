"""Guidance: functions that make a Denoise out of others, and know no network.

The network arrives as `denoise(x, sigma, conditioning) -> x0`; what comes out is (x, sigma) -> x0, as samplers want it.
All differences are taken between pictures x0. That is the same as between predicted noises or velocities, because
each is a linear function of x0 at a given x and sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning, stack
from gouache.diffusion.denoiser import Prediction, per_image, scaling
from gouache.diffusion.samplers.sampler import Denoise

ConditionedDenoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, C, H, W), sigma scalar or (B,), conditioning of B rows) -> x0 shaped like x."""


def cfg(
    denoise: ConditionedDenoise,
    positive: Conditioning,
    negative: Conditioning | None,
    scale: float,
    *,
    rescale: float = 0.0,
    prediction: Prediction = "v",
) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): x0 = negative + scale * (positive - negative).

    At scale 1, or without a negative, the negative is never computed. `rescale` from 0 to 1 is the phi of Lin et al.
    2023, which takes back the contrast that guidance adds; it acts on what the network says, so it needs to know
    what that is.
    """
    if negative is None or scale == 1:
        return lambda x, sigma: denoise(x, sigma, positive)
    together = _together(denoise, positive, negative)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        wanted, unwanted = together(x, sigma)
        x0 = unwanted + scale * (wanted - unwanted)
        return _rescaled(x0, wanted, x, sigma, rescale, prediction) if rescale else x0

    return guided


def instruct(
    denoise: ConditionedDenoise, positive: Conditioning, negative: Conditioning, scale: float, image_scale: float
) -> Denoise:
    """Two-fold guidance of instruct-pix2pix (Brooks et al. 2023, eq. 3): towards the words, and towards the picture.

    Both conditionings carry the picture's latent in `concat`; the third pass has the negative words and no picture.
    """
    without_picture = negative
    if negative.concat is not None:
        without_picture = replace(negative, concat=torch.zeros_like(negative.concat))
    together = _together(denoise, positive, negative, without_picture)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        words, picture, nothing = together(x, sigma)
        return nothing + scale * (words - picture) + image_scale * (picture - nothing)

    return guided


def masked(denoise: Denoise, mask: Tensor, original: Tensor) -> Denoise:
    """Inpainting with an ordinary model: paint where `mask` is 1, keep the latent `original` where it is 0.

    Both broadcast to x. The mask acts on x0 alone, in steps between: outside it x0 is `original`, so every sampler
    walks from original + sigma * n to original there, along the noise it started with or adds.
    """
    return lambda x, sigma: torch.lerp(original, denoise(x, sigma), mask)


def at_progress(denoise: Denoise, sigmas: Tensor, tell: Callable[[float], None]) -> Denoise:
    """`denoise`, before each call of which `tell` hears what share of the run over `sigmas` is done.

    The step is told by the level: one between two of the run's, which second-order samplers visit, is of the step that
    began above it.
    """
    starts, steps = sigmas[:-1], len(sigmas) - 1

    def told(x: Tensor, sigma: Tensor) -> Tensor:
        begun = int((starts.to(sigma.device) >= sigma.max() * (1 - 1e-6)).sum())
        tell(max(begun - 1, 0) / steps)
        return denoise(x, sigma)

    return told


def _together(
    denoise: ConditionedDenoise, *conditionings: Conditioning
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """One x under several conditionings: in one call where they stack, else one after the other."""
    count = len(conditionings)
    if not all(conditionings[0].stacks_with(other) for other in conditionings[1:]):
        return lambda x, sigma: tuple(denoise(x, sigma, each) for each in conditionings)
    batch = stack(*conditionings)

    def in_one_call(x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        levels = sigma.repeat(count) if sigma.ndim else sigma
        return denoise(x.repeat(count, 1, 1, 1), levels, batch).chunk(count)

    return in_one_call


def _rescaled(x0: Tensor, wanted: Tensor, x: Tensor, sigma: Tensor, amount: float, prediction: Prediction) -> Tensor:
    """Lin et al. 2023, eq. 15 and 16: bring the guided prediction's spread, image by image, to the positive's."""
    factors = scaling(prediction, per_image(sigma, x))
    guided, positive = ((picture - factors.c_skip * x) / factors.c_out for picture in (x0, wanted))
    spread = positive.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return factors.c_skip * x + factors.c_out * guided * torch.lerp(torch.ones_like(spread), spread, amount)
