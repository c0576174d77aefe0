"""Hypernetworks, as NovelAI introduced and A1111 trains them: small networks that change the input of attention.

There is a pair of networks for each input width: x + strength * mlp(x) is the input of `to_k` by the first and of
`to_v` by the second. So one file acts on self-attention (the widths of the U-Net) and on the prompt (768, 1024).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile

# torch's activations by the names that A1111 writes into its files: its own six, then the class names, lower case.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "elu": F.elu,
    "swish": F.hardswish,  # A1111 maps this name to hardswish
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "celu": F.celu,
    "gelu": F.gelu,
    "glu": F.glu,  # halves the width, so no working file uses it
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "rrelu": F.rrelu,  # outside training it has the mean slope
    "selu": F.selu,
    "silu": F.silu,
    "softmax": partial(F.softmax, dim=-1),
    "softmax2d": partial(F.softmax, dim=-3),
    "softmin": partial(F.softmin, dim=-1),
    "logsoftmax": partial(F.log_softmax, dim=-1),
    "softplus": F.softplus,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "threshold": partial(F.threshold, threshold=0.0, value=0.0),
}
_NAME = re.compile(r"(\d{1,6})\.([01])\.(?:linear\.(\d{1,3})|linear(\d))\.(weight|bias)")


class Layers(Protocol):
    """One of the two networks for a width: (..., width) -> the same shape."""

    def __call__(self, x: Tensor, name: str, /) -> Tensor:
        """`name` is that of the module whose input changes: dropouts of networks in training differ by it."""
        ...


@dataclass(frozen=True)
class Mlp:
    """Layers in order: ("linear" or "norm", weight, bias), ("prelu", slope, None), or the name of an activation."""

    steps: tuple[tuple[str, Tensor, Tensor | None] | str, ...]

    def __call__(self, x: Tensor, name: str = "") -> Tensor:
        for step in self.steps:
            if isinstance(step, str):
                x = ACTIVATIONS[step](x)
            elif step[0] == "prelu":
                x = F.prelu(x.transpose(1, -1), step[1].to(x)).transpose(1, -1)
            elif step[0] == "linear":
                x = F.linear(x, step[1].to(x), None if step[2] is None else step[2].to(x))
            else:
                x = F.layer_norm(x, step[1].shape, step[1].to(x), None if step[2] is None else step[2].to(x))
        return x


@dataclass(frozen=True)
class Hypernetwork:
    """{width: (for keys, for values)}."""

    file: ModelFile
    pairs: Mapping[int, tuple[Mlp, Mlp]]


def read_hypernetwork(file: ModelFile) -> Hypernetwork:
    """Read A1111's `.pt` or NovelAI's, with any layers. Raises ModelError that names what is not supported."""
    found: dict[int, dict[int, dict[int, dict[str, Tensor]]]] = {}
    for name in file:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelError(f"{printable(str(file.path))}: {printable(name)} is not a tensor of a hypernetwork")
        number = int(match[3]) if match[3] is not None else int(match[4]) - 1  # NovelAI's linear1 and linear2
        layers = found.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})
        layers.setdefault(number, {})[match[5]] = file.tensor(name).float()
    pairs: dict[int, tuple[Mlp, Mlp]] = {}
    for width, sides in sorted(found.items()):
        if set(sides) != {0, 1}:
            raise ModelError(
                f"{printable(str(file.path))} has one network for inputs of width {width}, expected two: for keys and "
                f"for values"
            )
        pairs[width] = _mlp(file, width, sides[0]), _mlp(file, width, sides[1])
    if not pairs:
        raise ModelError(f"{printable(str(file.path))} holds no network, so it is not a hypernetwork")
    return Hypernetwork(file, pairs)


def _mlp(file: ModelFile, width: int, layers: Mapping[int, Mapping[str, Tensor]]) -> Mlp:
    """The layers in the order of their numbers; activations have no tensors, flags say where they are."""
    where = printable(str(file.path))
    name = str(file.extra.get("activation_func") or "linear").lower()
    if name not in ("linear", "prelu") and name not in ACTIVATIONS:
        raise ModelError(f"{where}: its activation {printable(name)} is not known; known are {', '.join(ACTIVATIONS)}")
    last_too = file.extra.get("activate_output", True)  # A1111's default for files without this flag
    linears = [number for number, layer in sorted(layers.items()) if "weight" in layer and layer["weight"].ndim == 2]
    if any("weight" not in layer for layer in layers.values()) or name == "glu":
        raise ModelError(f"{where}: its network for inputs of width {width} is incomplete or cannot work")
    steps: list[tuple[str, Tensor, Tensor | None] | str] = []
    wide = width
    for number, layer in sorted(layers.items()):
        weight, bias = layer["weight"], layer.get("bias")
        outs = (weight.shape[0] if weight.ndim else 0,)
        slopes = name == "prelu" and bias is None and weight.ndim == 1 and outs[0] in (1, wide)
        fits = weight.ndim == 2 or slopes or (weight.ndim == 1 and outs == (wide,))
        if not fits or (bias is not None and tuple(bias.shape) != outs):
            raise ModelError(
                f"{where}: layer {number} for inputs of width {width} has tensors that do not fit each other"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in layer.values()):
            raise ModelError(f"{where} is damaged: it holds NaN or infinite numbers")
        if weight.ndim == 2:
            if weight.shape[1] != wide:
                raise ModelError(
                    f"{where}: a layer for inputs of width {width} expects {weight.shape[1]}, but receives {wide}"
                )
            wide = weight.shape[0]
            steps.append(("linear", weight, bias))
            # PReLU is the only activation with a tensor, so it is numbered among the layers.
            if name not in ("linear", "prelu") and (number != linears[-1] or last_too):
                steps.append(name)
        elif name == "prelu" and bias is None:
            steps.append(("prelu", weight, None))
        else:
            steps.append(("norm", weight, bias))
    if wide != width:
        raise ModelError(f"{where}: its network for inputs of width {width} returns width {wide}")
    return Mlp(tuple(steps))


class HypernetworkHooks:
    """A hypernetwork on the inputs of `to_k` and `to_v` of a network's attention, from `attach` until `remove`."""

    def __init__(self, network: nn.Module, pairs: Mapping[int, tuple[Layers, Layers]], strength: float) -> None:
        self.strength = strength
        self._layers = [
            (name, module, pairs[module.in_features][side])
            for name, module, side in keys_and_values(network)
            if module.in_features in pairs
        ]
        self._handles: list[RemovableHandle] = []
        self.modules = [name for name, _, _ in self._layers]
        self.unused = sorted(set(pairs) - {module.in_features for _, module, _ in self._layers})

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Does nothing if it is attached."""
        if not self._handles:
            for name, module, layers in self._layers:
                self._handles.append(module.register_forward_pre_hook(partial(self._change, name, layers)))

    def remove(self) -> None:
        """Can be called again after an interrupt, and then goes on."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def _change(
        self, name: str, layers: Layers, module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if self.strength == 0:
            return None
        x = inputs[0]
        return (x + self.strength * layers(x, name), *inputs[1:])


def keys_and_values(network: nn.Module) -> Iterator[tuple[str, nn.Linear, int]]:
    """(name, module, 0 for keys and 1 for values)"""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".to_k", ".to_v")):
            yield name, module, int(name.endswith(".to_v"))
