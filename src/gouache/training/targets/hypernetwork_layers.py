"""The layers of a hypernetwork in training, as A1111 builds them: their order, their numbers, their first values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gouache.adapters.hypernetwork import ACTIVATIONS
from gouache.errors import RequestError, printable
from gouache.layouts.nearest import nearest
from gouache.nn import products
from gouache.training.targets.dropout import dropout_mask, module_generator

NO_ACTIVATION = "linear"
INITIALISATIONS = ("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")
USUAL_DROPOUT = 0.3  # A1111's, where only `use_dropout` is given
MOST_NUMBERS, MOST_WIDTH = 32, 2**16

_ACROSS = "works across the pictures of a batch in A1111, so that one picture would change the others"
_IMPOSSIBLE: Mapping[str, str] = {
    "glu": "halves the width, so that the next layer does not fit",
    "threshold": "needs a threshold and a value, which A1111 does not give it",
    "multiheadattention": "is not a function of one tensor, and A1111 cannot build it",
    **dict.fromkeys(("softmax", "softmax2d", "softmin", "logsoftmax"), _ACROSS),
}
_RRELU = (1 / 8, 1 / 3)  # the range of its random slopes, torch's default


@dataclass(frozen=True)
class HypernetworkOptions:
    """The settings of a trained hypernetwork, as in A1111's page "Create hypernetwork".

    `structure`: the widths of the layers relative to that of the input. `activation` is one of A1111's names;
    "linear" is none. It follows every linear layer, the last one only with `activate_output`; `layer_norm` adds a layer
    norm after it.

    `dropout` has a probability for each number of `structure`: that after the linear layer which has this width; the
    first is 0. Instead of it, `use_dropout` drops 0.3 after all layers but the last two, and with `last_layer_dropout`
    after the last but one too. `initialisation` is how weights begin; biases begin as 0.

    `widths` are the widths of inputs that are changed; () is all that the model has: those of its self-attention, and
    that of its prompts. Raises RequestError for settings that do not go together or cannot work.
    """

    structure: tuple[float, ...] = (1, 2, 1)
    activation: str = NO_ACTIVATION
    activate_output: bool = False
    layer_norm: bool = False
    dropout: tuple[float, ...] = ()
    use_dropout: bool = False
    last_layer_dropout: bool = False
    initialisation: str = INITIALISATIONS[0]
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        structure, shown = self.structure, _listed(self.structure)
        if not 2 <= len(structure) <= MOST_NUMBERS:
            raise RequestError(
                "hypernetwork.structure", f"has {len(structure)} numbers; expected 2 to {MOST_NUMBERS}, as in 1, 2, 1"
            )
        if not all(math.isfinite(each) and each > 0 for each in structure):
            raise RequestError("hypernetwork.structure", f"is {shown}; expected numbers above 0, as in 1, 2, 1")
        if structure[0] != 1 or structure[-1] != 1:
            raise RequestError("hypernetwork.structure", f"is {shown}; it must begin and end with 1, as in 1, 2, 1")
        self._check_activation()
        if self.initialisation not in INITIALISATIONS:
            name = printable(self.initialisation, 40)
            raise RequestError(
                "hypernetwork.initialisation", f"{name!r} is not known; use {', '.join(INITIALISATIONS)}"
            )
        self._check_dropout()

    def _check_activation(self) -> None:
        name, known = self.activation, sorted({NO_ACTIVATION, "prelu", *ACTIVATIONS} - set(_IMPOSSIBLE))
        if why := _IMPOSSIBLE.get(name):
            raise RequestError("hypernetwork.activation", f"{name} {why}; use {', '.join(known)}")
        if name not in known:
            near = nearest(name.lower(), known)
            hint = f"; the nearest is {near}" if near else f"; use {', '.join(known)}"
            raise RequestError("hypernetwork.activation", f"{printable(name, 40)!r} is not known{hint}")

    def _check_dropout(self) -> None:
        shown = _listed(self.dropout)
        if self.dropout and len(self.dropout) != len(self.structure):
            found, expected = len(self.dropout), len(self.structure)
            raise RequestError(
                "hypernetwork.dropouts", f"has {found} numbers; expected {expected}, one for each of structure"
            )
        if not all(0 <= each < 1 for each in self.dropout):
            raise RequestError("hypernetwork.dropouts", f"is {shown}; expected probabilities from 0 to below 1")
        if self.dropout and self.dropout[0] != 0:
            raise RequestError("hypernetwork.dropouts", f"is {shown}; the first must be 0, since no layer precedes it")
        if self.dropout and self.use_dropout:
            raise RequestError(
                "hypernetwork.use_dropout", f"and dropouts ({shown}) exclude each other; leave out one of them"
            )
        if self.last_layer_dropout and not self.use_dropout:
            raise RequestError(
                "hypernetwork.last_layer_dropout", "has no effect without use_dropout; set it too, or dropouts instead"
            )
        if self.use_dropout and not any(self.dropouts):
            structure = _listed(self.structure)
            raise RequestError(
                "hypernetwork.use_dropout", f"drops nothing of {structure}; set last_layer_dropout, or dropouts instead"
            )

    @property
    def rate_factors(self) -> set[float]:
        """The factors of the learning rate of all parameters."""
        return {1.0}

    @property
    def dropouts(self) -> tuple[float, ...]:
        """The probability for each number of `structure`."""
        return self.dropout or usual_dropouts(len(self.structure), self.use_dropout, self.last_layer_dropout)

    def sizes(self, width: int) -> list[int]:
        """The widths of the layers for inputs of `width`. Raises RequestError for impossible ones."""
        sizes = [int(width * each) for each in self.structure]
        for size, each in zip(sizes, self.structure):
            if not 1 <= size <= MOST_WIDTH:
                message = f"{each:g} makes a layer of width {size} of inputs of {width}; expected 1 to {MOST_WIDTH}"
                raise RequestError("hypernetwork.structure", message)
        return sizes


def usual_dropouts(count: int, use: bool, last_but_one: bool) -> tuple[float, ...]:
    """A1111's probabilities for a structure of `count` numbers, where it has none of its own."""
    if not use:
        return (0.0,) * count
    inner = [USUAL_DROPOUT] * max(0, count - 3)
    return (0.0, *inner, USUAL_DROPOUT if last_but_one else 0.0, 0.0)[:count]


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{each:g}" for each in numbers)


class Draws:
    """The random generators of a batch, by (seed, batch number, module, layer); none before the first `begin_batch`."""

    def __init__(self, seed: int) -> None:
        self._seed, self._number = seed, -1

    def begin_batch(self, number: int) -> None:
        self._number = number

    def generator(self, module: str, layer: int, device: torch.device) -> torch.Generator | None:
        """None where gradients are disabled, as in validation and when painting."""
        if self._number < 0 or not torch.is_grad_enabled():
            return None
        return module_generator(self._seed, ("hypernetwork", f"{module}/{layer}"), self._number, device)


class Activation(nn.Module):
    """A function without parameters by A1111's name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class HypernetworkLayers(nn.Module):
    """The network that changes the keys' or the values' inputs of one width, (..., width) -> the same shape.

    Its `state_dict` has A1111's names: each layer has a number, also those without parameters, except no activation
    ("linear"). The parameters are on the meta device until `initialise` or `load_state_dict(assign=True)`.
    """

    def __init__(self, width: int, options: HypernetworkOptions, draws: Draws) -> None:
        super().__init__()
        self.draws = draws
        sizes, layers = options.sizes(width), list[nn.Module]()
        for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            layers.append(nn.Linear(inputs, outputs, device="meta"))
            if options.activation != NO_ACTIVATION and (number < len(sizes) - 1 or options.activate_output):
                prelu = options.activation == "prelu"
                layers.append(nn.PReLU(device="meta") if prelu else Activation(options.activation))
            if options.layer_norm:
                layers.append(nn.LayerNorm(outputs, device="meta"))
            if rate := options.dropouts[number]:
                layers.append(nn.Dropout(rate))
        self.linear = nn.Sequential(*layers)

    @torch.no_grad()
    def initialise(self, initialisation: str, generator: torch.Generator, device: torch.device | str = "cpu") -> None:
        """A1111's first values, drawn on the CPU. Weights of layer norms are always normal, as there."""
        for layer in self.linear:
            for name, parameter in layer.named_parameters():
                value = torch.zeros(parameter.shape)
                if isinstance(layer, nn.PReLU):
                    value.fill_(0.25)
                elif name == "weight":
                    _fill(value, initialisation if isinstance(layer, nn.Linear) else "Normal", generator)
                setattr(layer, name, nn.Parameter(value.to(device)))

    def forward(self, x: Tensor, name: str = "") -> Tensor:
        """Computed in the dtype of `x`, or in float32 where that is faster (`nn.products`)."""
        if products.applies_to(x):
            return self.forward(x.float(), name).to(x.dtype)
        for number, layer in enumerate(self.linear):
            if isinstance(layer, nn.Dropout):
                if (generator := self.draws.generator(name, number, x.device)) is not None:
                    x = x * dropout_mask(x.shape, layer.p, generator).to(x.dtype)
            elif isinstance(layer, Activation) and layer.name == "rrelu":
                x = self._rrelu(layer, x, self.draws.generator(name, number, x.device))
            else:
                x = functional_call(layer, {key: each.to(x) for key, each in layer.named_parameters()}, (x,))
        return x

    def _rrelu(self, layer: Activation, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return layer(x)
        low, high = _RRELU
        slopes = low + (high - low) * torch.rand(x.shape, generator=generator, device=x.device)
        return torch.where(x >= 0, x, x * slopes.to(x.dtype))


def _fill(weight: Tensor, initialisation: str, generator: torch.Generator) -> None:
    """Kaiming's gain is sqrt(2) for A1111's "leakyrelu" as for all others: the slope that it gives is 0."""
    match initialisation:
        case "XavierUniform":
            nn.init.xavier_uniform_(weight, generator=generator)
        case "XavierNormal":
            nn.init.xavier_normal_(weight, generator=generator)
        case "KaimingUniform":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
        case "KaimingNormal":
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        case _:
            weight.normal_(0.0, 0.01, generator=generator)
