"""The transformer that CLIP's text and image towers share, in Transformers names (Radford et al. 2021).

Pre-norm blocks. OpenAI's weights were trained with the quick GELU, OpenCLIP's with the erf GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.errors import ModelError
from gouache.nn.attention import attention


def activate(x: Tensor, name: str) -> Tensor:
    """The feed-forward's non-linearity: "quick_gelu" is x * sigmoid(1.702 x), "gelu" the exact one."""
    return x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else F.gelu(x)


class Embedding(nn.Embedding):
    """A table of vectors that costs nothing to build on the meta device.

    There is nothing to fill there, yet torch would import its compiler, a second of work, only to draw no numbers.
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
            raise ModelError(f"activation {activation!r} is not known; a CLIP tower has 'quick_gelu' or 'gelu'")
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
    """A stack of layers that hands out what each of them made."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, activation: str, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, inner, activation, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, N, D) -> the input and every layer's output: layers + 1 tensors of that shape."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)
