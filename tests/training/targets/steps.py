"""A few training steps of a target on a narrow model, without the loop: fixed latents, noise, levels and prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import gouache
from gouache import Model
from gouache.diffusion.conditioning import Conditioning
from gouache.training.target import Target
from tests.pipelines import Narrow

FAMILIES = ("sd1", "sd2", "sdxl", "sd1-inpainting")
PROMPTS = ["a red cat", "a blue dog"]
SIZE = (8, 16)  # of latents: with 8 by 8, the middle block's self-attention has one token and depends on no query


def cases(forms: Iterable[str], *, alike: Collection[str], of_others: Iterable[str]) -> list[Any]:
    """(family, form): every form on SD1, and locon on SDXL; `full` are those that are `alike` to tested ones, locon on
    the others, and `of_others` on all others."""
    full = [("sd1", form) for form in alike] + [(family, form) for family in FAMILIES[1:] for form in of_others]
    full += [("sd2", "locon"), ("sd1-inpainting", "locon")]
    usual = [("sd1", form) for form in forms if form not in alike] + [("sdxl", "locon")]
    return [*usual, *(pytest.param(*each, marks=pytest.mark.full) for each in full)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditioning(model: Model) -> Conditioning:
    encoded = model.encode_prompts(PROMPTS, size=(64, 64))
    if model.unet.spec.in_channels == 4:
        return encoded
    concat = torch.randn(2, model.unet.spec.in_channels - 4, *SIZE, generator=generator(5))
    return Conditioning(encoded.context, encoded.vector, concat)


def loss(model: Model) -> Tensor:
    """The mean squared error of two noised latents, through the text encoders and the U-Net."""
    x0, noise = (torch.randn(2, 4, *SIZE, generator=generator(seed)) for seed in (1, 2))
    predicted, wanted = model.denoiser(conditioning(model)).loss_terms(x0, noise, torch.tensor([0.7, 3.0]))
    return (predicted - wanted).pow(2).mean()


@torch.no_grad()
def output(model: Model) -> Tensor:
    """The U-Net's prediction of x0 for prompts, through the text encoders."""
    x = torch.randn(2, 4, *SIZE, generator=generator(3))
    return model.denoiser(conditioning(model))(x, torch.tensor([2.0, 0.5]))


def train(model: Model, target: Target, steps: int = 4, rate: float = 3e-3) -> list[float]:
    """The losses of `steps` steps of Adam, each of them a batch."""
    options = [{"params": list(g.parameters.values()), "lr": rate * g.rate} for g in target.groups()]
    optimizer = torch.optim.Adam(options)
    losses = []
    for number in range(steps):
        target.begin_batch(number)
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def weights(target: Target) -> dict[str, Tensor]:
    """Copies of the trained weights, under their names in checkpoints."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, network in target.networks.items()
        for key, tensor in network.named_parameters()
    }


def loader(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    """Narrow models by family, each loaded once; a test detaches what it attaches."""
    return functools.cache(lambda family: gouache.load(narrow(family).file, device="cpu", dtype="fp32"))
