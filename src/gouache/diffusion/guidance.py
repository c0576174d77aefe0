"""Guidance: functions that make a Denoise from others, without knowing any network.

The network is passed as `denoise(x, sigma, conditioning) -> x0`; the result is (x, sigma) -> x0, as samplers need it.
All differences are between predictions of x0. That is the same as between predicted noises or velocities, because
each is a linear function of x0 at a given x and sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gouache.diffusion.conditioning import Conditioning, stack
from gouache.diffusion.denoiser import Prediction, per_image, scaling
from gouache.diffusion.samplers.sampler import Denoise, OnStep, Step
from gouache.errors import RequestError

ConditionedDenoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x (B, ...), sigma scalar or (B,), conditioning of B rows) -> x0 shaped like x."""


@dataclass(frozen=True, eq=False)
class Term:
    """One part of a positive prompt, and its weight (`AND`)."""

    conditioning: Conditioning
    weight: float = 1.0


def cfg(
    denoise: ConditionedDenoise,
    positive: Conditioning | Sequence[Term],
    negative: Conditioning | None,
    scale: float,
    *,
    rescale: float = 0.0,
    prediction: Prediction = "v",
) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): x0 = negative + scale * sum of weight * (positive - negative).

    Several terms are composed as Liu et al. 2022 do. With one term of weight 1, at scale 1 or without a negative, the
    negative is never computed. `rescale` from 0 to 1 is the phi of Lin et al. 2023, which reduces the contrast that
    guidance adds; it acts on the network's output, so it depends on `prediction`.
    """
    terms = [Term(positive)] if isinstance(positive, Conditioning) else list(positive)
    if negative is None or (scale == 1 and len(terms) == 1 and terms[0].weight == 1):
        if len(terms) == 1:
            return lambda x, sigma: denoise(x, sigma, terms[0].conditioning)
        raise RequestError("prompt", "parts joined by AND need a negative conditioning")
    predict = _together(denoise, *(term.conditioning for term in terms), negative)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        *wanted, unwanted = predict(x, sigma)
        direction = torch.stack([term.weight * (each - unwanted) for term, each in zip(terms, wanted)]).sum(0)
        x0 = unwanted + scale * direction
        return _rescaled(x0, unwanted + direction, x, sigma, rescale, prediction) if rescale else x0

    return guided


def instruct(
    denoise: ConditionedDenoise, positive: Conditioning, negative: Conditioning, scale: float, image_scale: float
) -> Denoise:
    """The two guidances of instruct-pix2pix (Brooks et al. 2023, eq. 3): towards the prompt, and towards the picture.

    Both conditionings carry the picture's latent in `concat`; the third pass has the negative prompt and no picture.
    """
    without_picture = negative
    if negative.concat is not None:
        without_picture = replace(negative, concat=torch.zeros_like(negative.concat))
    predict = _together(denoise, positive, negative, without_picture)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        prompt, picture, nothing = predict(x, sigma)
        return nothing + scale * (prompt - picture) + image_scale * (picture - nothing)

    return guided


def masked(denoise: Denoise, mask: Tensor, original: Tensor) -> Denoise:
    """Inpainting with an ordinary model: paint where `mask` is 1, keep the latent `original` where it is 0.

    Both broadcast to x. The mask acts on x0 alone, in steps between: outside it x0 is `original`, so every sampler
    moves from original + sigma * n to original there, along the noise it started with or adds.
    """
    return lambda x, sigma: torch.lerp(original, denoise(x, sigma), mask)


def by_step(make: Callable[[int], Denoise], on_step: OnStep | None, first: int = 1) -> tuple[Denoise, OnStep]:
    """A denoise that changes from step to step: `make(step)` makes it, called once per step, counted from `first`.

    Returns it with the `on_step` that the sampler must be given: a step is over when the sampler reports it, however
    often it called the network, so second-order samplers count steps and not calls.
    """
    done = 0
    made: tuple[int, Denoise] | None = None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal made
        if made is None or made[0] != done:
            made = done, make(first + done)
        return made[1](x, sigma)

    def count(step: Step) -> None:
        nonlocal done
        done = step.index + 1
        if on_step is not None:
            on_step(step)

    return denoise, count


def _together(
    denoise: ConditionedDenoise, *conditionings: Conditioning
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """One x with several conditionings: in one call if they can be batched, else one after the other."""
    count = len(conditionings)
    if not all(conditionings[0].stacks_with(other) for other in conditionings[1:]):
        return lambda x, sigma: tuple(denoise(x, sigma, each) for each in conditionings)
    batch = stack(*conditionings)

    def in_one_call(x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        levels = sigma.repeat(count) if sigma.ndim else sigma
        return denoise(x.repeat(count, *[1] * (x.ndim - 1)), levels, batch).chunk(count)

    return in_one_call


def _rescaled(x0: Tensor, wanted: Tensor, x: Tensor, sigma: Tensor, amount: float, prediction: Prediction) -> Tensor:
    """Lin et al. 2023, eq. 15 and 16: the guided prediction's standard deviation, per image, becomes the positive's."""
    factors = scaling(prediction, per_image(sigma, x))
    guided, positive = ((each - factors.c_skip * x) / factors.c_out for each in (x0, wanted))
    axes = tuple(range(1, x.ndim))
    ratio = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return factors.c_skip * x + factors.c_out * guided * torch.lerp(torch.ones_like(ratio), ratio, amount)
