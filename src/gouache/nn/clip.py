"""The transformer shared by CLIP's text and image towers, with the names of Transformers (Radford et al. 2021).

Pre-norm blocks. OpenAI's weights were trained with the quick GELU, OpenCLIP's with the erf GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.errors import ModelError
from gouache.nn.attention import attention


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of the feed-forward: "quick_gelu" is x * sigmoid(1.702 x), "gelu" the erf GELU."""
    return x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else F.gelu(x)


class Embedding(nn.Embedding):
    """An embedding table that skips its random initialisation on the meta device.

    Meta tensors have no values to initialise, yet torch would import its compiler for it, which takes a second.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, causal=self.causal))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        if activation not in ("quick_gelu", "gelu"):
            raise ModelError(f"unknown CLIP activation {activation!r}; expected 'quick_gelu' or 'gelu'")
        self.activation = activation
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, inner, activation)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """A stack of layers that returns the output of every layer."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, inner, activation, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, N, D) -> the input and every layer's output: layers + 1 tensors of that shape."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)
