"""The parts of each form before training, with which a module computes exactly what it did without them.

Names and shapes are those of kohya's and LyCORIS' files (`adapters.forms`); values are those that the papers and these
trainers begin with. r is the rank; n = in * k * k for a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gouache.adapters.forms import dora_magnitude
from gouache.training.targets.options import IA3_INPUTS, AdapterOptions, Choice

NUMBERS = ("alpha", "scale", "scalar", "on_input", "cayley_terms")
"""Parts that are settings of a form: not trained, and kept on the CPU, where the forms read them."""


def initial_parts(
    path: str, layer: nn.Module, choice: Choice, options: AdapterOptions, generator: torch.Generator
) -> dict[str, Tensor]:
    """The parts of one module, float32 on its device; those to be trained require gradients."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    parts = _FORMS[choice.form](weight, choice, options, generator)
    if choice.form == "full" and isinstance(bias, Tensor):
        parts["diff_b"] = torch.zeros(bias.shape)
    if choice.form == "ia3":
        on_input = path.endswith(IA3_INPUTS)
        parts = {"weight": torch.zeros(weight.shape[int(on_input)]), "on_input": torch.tensor(float(on_input))}
    if options.trains_magnitudes and choice.form != "full":
        parts["dora_scale"] = dora_magnitude(weight.detach().float())
    return {name: part if name in NUMBERS else part.to(weight.device).requires_grad_() for name, part in parts.items()}


def _lora(weight: Tensor, choice: Choice, options: AdapterOptions, generator: torch.Generator) -> dict[str, Tensor]:
    rows, rank = weight.shape[0], choice.rank
    ones = [1] * (weight.ndim - 2)
    return {
        "lora_down.weight": _uniform((rank, *weight.shape[1:]), generator),
        "lora_up.weight": torch.zeros(rows, rank, *ones),
        "alpha": torch.tensor(choice.alpha),
    }


def _loha(weight: Tensor, choice: Choice, options: AdapterOptions, generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns, rank = weight.shape[0], weight[0].numel(), choice.rank
    return {
        "hada_w1_a": 0.1 * torch.randn(rows, rank, generator=generator),
        "hada_w1_b": torch.randn(rank, columns, generator=generator),
        "hada_w2_a": torch.zeros(rows, rank),
        "hada_w2_b": torch.randn(rank, columns, generator=generator),
        "alpha": torch.tensor(choice.alpha),
    }


def _lokr(weight: Tensor, choice: Choice, options: AdapterOptions, generator: torch.Generator) -> dict[str, Tensor]:
    """The left factor is full; the right one is a product of rank r where that has fewer numbers."""
    rows, columns = (factor_pair(size, options.factor) for size in weight.shape[:2])
    kernel = weight.shape[2:]
    parts = {"lokr_w1": _uniform((rows[0], columns[0]), generator)}
    if choice.rank < max(rows[1], columns[1]) / 2:
        parts["lokr_w2_a"] = _uniform((rows[1], choice.rank), generator)
        parts["lokr_w2_b"] = torch.zeros(choice.rank, columns[1] * math.prod(kernel))
    else:
        parts["lokr_w2"] = torch.zeros(rows[1], columns[1], *kernel)
    return parts | {"alpha": torch.tensor(choice.alpha)}


def _oft(weight: Tensor, choice: Choice, options: AdapterOptions, generator: torch.Generator) -> dict[str, Tensor]:
    width, blocks = factor_pair(weight.shape[0], choice.rank)
    return {"oft_blocks": torch.zeros(blocks, width, width), "alpha": torch.tensor(options.constraint)}


def _full(weight: Tensor, choice: Choice, options: AdapterOptions, generator: torch.Generator) -> dict[str, Tensor]:
    return {"diff": torch.zeros(weight.shape)}


_FORMS: Mapping[str, Callable[[Tensor, Choice, AdapterOptions, torch.Generator], dict[str, Tensor]]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "full": _full,
    "ia3": lambda *_: {},
}


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in +-1 / sqrt(inputs): what nn.Linear begins with."""
    bound = math.prod(shape[1:]) ** -0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def factor_pair(size: int, limit: int) -> tuple[int, int]:
    """(a, b) with a * b = size and a <= b, the largest such a up to `limit`; -1 is no limit.

    A limit that divides `size` is always one of the two, as in LyCORIS.
    """
    if limit > 0 and size % limit == 0:
        return min(limit, size // limit), max(limit, size // limit)
    most = math.isqrt(size) if limit < 0 else min(limit, math.isqrt(size))
    smaller = next(number for number in range(most, 0, -1) if size % number == 0)
    return smaller, size // smaller
