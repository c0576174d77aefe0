"""Hypernetworks, as NovelAI introduced and A1111 trains them: small networks that change what attention is told.

For each width of what is attended to, there is a pair: x + strength * mlp(x) goes into `to_k` by the one and into
`to_v` by the other. So the same file acts on self-attention (the widths of the U-Net) and on the prompt (768, 1024).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.errors import ModelError, printable
from gouache.files.record import ModelFile

# torch's activations by the names that A1111 writes into its files: its own six, then the class names, lower case.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "elu": F.elu,
    "swish": F.hardswish,  # which is what A1111 means by it
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "celu": F.celu,
    "gelu": F.gelu,
    "glu": F.glu,  # which halves the width, so that no file that works says it
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "rrelu": F.rrelu,  # which outside training has the mean slope
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


@dataclass(frozen=True)
class Mlp:
    """Layers in turn: ("linear" or "norm", weight, bias), ("prelu", its slope, None), or an activation by name."""

    steps: tuple[tuple[str, Tensor, Tensor | None] | str, ...]

    def __call__(self, x: Tensor) -> Tensor:
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
    """A1111's `.pt` and NovelAI's, with whatever layers. Raises ModelError naming what cannot be followed."""
    found: dict[int, dict[int, dict[int, dict[str, Tensor]]]] = {}
    for name in file:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelError(f"{printable(str(file.path))}: {printable(name)} is no tensor of a hypernetwork")
        number = int(match[3]) if match[3] is not None else int(match[4]) - 1  # NovelAI's linear1 and linear2
        layers = found.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})
        layers.setdefault(number, {})[match[5]] = file.tensor(name).float()
    pairs: dict[int, tuple[Mlp, Mlp]] = {}
    for width, sides in sorted(found.items()):
        if set(sides) != {0, 1}:
            raise ModelError(f"{printable(str(file.path))} has but one network for contexts {width} wide; it takes two")
        pairs[width] = _mlp(file, width, sides[0]), _mlp(file, width, sides[1])
    if not pairs:
        raise ModelError(f"{printable(str(file.path))} holds no network: it is no hypernetwork")
    return Hypernetwork(file, pairs)


def _mlp(file: ModelFile, width: int, layers: Mapping[int, Mapping[str, Tensor]]) -> Mlp:
    """The layers in the order of their numbers; activations have no tensors and stand where the flags say."""
    where = printable(str(file.path))
    name = str(file.extra.get("activation_func") or "linear").lower()
    if name not in ("linear", "prelu") and name not in ACTIVATIONS:
        raise ModelError(f"{where}: its activation {printable(name)} is not known; there are {', '.join(ACTIVATIONS)}")
    last_too = file.extra.get("activate_output", True)  # A1111's default for files that do not say
    linears = [number for number, layer in sorted(layers.items()) if "weight" in layer and layer["weight"].ndim == 2]
    if any("weight" not in layer for layer in layers.values()) or name == "glu":
        raise ModelError(f"{where}: its network for contexts {width} wide is not whole, or of a form that cannot be")
    steps: list[tuple[str, Tensor, Tensor | None] | str] = []
    wide = width
    for number, layer in sorted(layers.items()):
        weight, bias = layer["weight"], layer.get("bias")
        outs = (weight.shape[0] if weight.ndim else 0,)
        slopes = name == "prelu" and bias is None and weight.ndim == 1 and outs[0] in (1, wide)
        fits = weight.ndim == 2 or slopes or (weight.ndim == 1 and outs == (wide,))
        if not fits or (bias is not None and tuple(bias.shape) != outs):
            raise ModelError(
                f"{where}: layer {number} for contexts {width} wide has tensors that do not fit each other"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in layer.values()):
            raise ModelError(f"{where} is damaged: it holds NaN or infinite numbers")
        if weight.ndim == 2:
            if weight.shape[1] != wide:
                raise ModelError(f"{where}: a layer for contexts {width} wide takes {weight.shape[1]}, not {wide}")
            wide = weight.shape[0]
            steps.append(("linear", weight, bias))
            # Of the activations, PReLU alone has a tensor, and so stands among the layers.
            if name not in ("linear", "prelu") and (number != linears[-1] or last_too):
                steps.append(name)
        elif name == "prelu" and bias is None:
            steps.append(("prelu", weight, None))
        else:
            steps.append(("norm", weight, bias))
    if wide != width:
        raise ModelError(f"{where}: its network for contexts {width} wide gives {wide} numbers")
    return Mlp(tuple(steps))


class Worn:
    """A hypernetwork on the keys and values of a network's attention, until `remove`."""

    def __init__(self, network: nn.Module, hypernetwork: Hypernetwork, strength: float) -> None:
        self.strength = strength
        self.modules: list[str] = []
        self._handles = []
        for name, module, side in _keys_and_values(network):
            pair = hypernetwork.pairs.get(module.in_features)
            if pair is not None:
                self.modules.append(name)
                self._handles.append(module.register_forward_pre_hook(partial(self._change, pair[side])))
        self.unused = sorted(set(hypernetwork.pairs) - {m.in_features for _, m, _ in _keys_and_values(network)})

    @property
    def removed(self) -> bool:
        return not self._handles

    def remove(self) -> None:
        """Interrupted, it goes on where it was when it is called again."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def _change(self, mlp: Mlp, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x + self.strength * mlp(x), *inputs[1:])


def _keys_and_values(network: nn.Module) -> Iterator[tuple[str, nn.Linear, int]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith((".to_k", ".to_v")):
            yield name, module, int(name.endswith(".to_v"))
