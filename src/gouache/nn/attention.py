"""The attention function of all networks, and the spatial transformer of the U-Nets.

Every network calls `attention`, so that a faster kernel has to be added in one place only.
Names follow CompVis' `ldm/modules/attention.py`, as used in files.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn import products


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with `heads` heads of d channels.

    q is (B, N, heads * d); k and v are (B, M, heads * d); returns (B, N, heads * d).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # B heads N d
    if _use_blocks(q, k) and not causal:
        out = _attention_in_blocks(q, k, v)
    elif products.applies_to(q) and not causal:
        out = products.attention(q, k, v)
    elif _use_matmul(q, k) and not causal:
        out = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).flatten(2)  # B N heads*d


def _use_matmul(q: Tensor, k: Tensor) -> bool:
    """In bfloat16 on a CPU, with gradients and few tokens, plain matmuls are faster than torch's fused kernel.

    Measured on Zen 5, one thread, 8 heads of 8 channels, 256 tokens, forward and backward: 1.7 times as fast.
    """
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return on_cpu and torch.is_grad_enabled() and q.shape[2] <= 1024 and k.shape[2] <= 1024


BLOCK_SCORES = 2**19  # scores computed at once per thread: 1 MiB in bfloat16, which stays in the cache


def _use_blocks(q: Tensor, k: Tensor) -> bool:
    """On a CPU, torch's fused kernel multiplies bfloat16 as float32; on AMD's, plain products of blocks are faster.

    Measured with one thread: 1.4 times as fast for 4096 tokens on Zen 4, 1.6 times for 1024; 0.8 times on an Intel
    Xeon. Decided by the maker and not by timing, since the choice changes how sums are rounded, and so the pictures.
    Without gradients only: it keeps none.
    """
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return on_cpu and not torch.is_grad_enabled() and k.shape[2] >= 256 and q.shape[2] >= 256 and _is_amd()


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")[:4000]
    except OSError:
        return "AMD" in platform.processor()


def _attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention computed per head and block of rows; all tensors are (B, heads, N or M, d)."""
    batch, heads, rows, width = q.shape
    q, v = (x.flatten(0, 1) for x in (q * width**-0.5, v))  # B*heads N d
    k = k.flatten(0, 1).transpose(1, 2)  # B*heads d M
    step = max(1, BLOCK_SCORES * torch.get_num_threads() // k.shape[2])
    out = torch.empty_like(q)
    for head in range(batch * heads):
        for first in range(0, rows, step):
            block = slice(first, first + step)
            torch.mm((q[head, block] @ k[head]).softmax(-1), v[head], out=out[head, block])
    return out.unflatten(0, (batch, heads))


@dataclass(eq=False)
class ImageProjections:
    """What an image prompt adapter (IP-Adapter, Ye et al. 2023) adds to one cross-attention.

    `to_k_ip` and `to_v_ip` map image tokens (B, M, D) to keys and values (B, M, width); they belong to the adapter,
    which also puts them on the network's device and dtype. `tokens` selects the adapter's own tokens from those of all
    adapters, which the network receives as one tensor; None selects all. `strength` may be changed between two steps.
    """

    to_k_ip: nn.Module
    to_v_ip: nn.Module
    strength: float = 1.0
    tokens: slice | None = None


class CrossAttention(nn.Module):
    """Attention of x to `context`, or to itself if there is none.

    Attached image projections add strength * attention(q, to_k_ip(image_tokens), to_v_ip(image_tokens)) before
    `to_out`. They are not submodules: parameters, state dict and `to` know only the official tensors.
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))  # named to_out.0 in files; to_out.1 was a dropout
        self._image_projections: tuple[ImageProjections, ...] = ()

    def attach_image_projections(self, projections: ImageProjections) -> None:
        """Use `projections` from the next call on, after those already attached."""
        self._image_projections = (*self._image_projections, projections)

    def detach_image_projections(self, projections: ImageProjections) -> None:
        """Undo `attach_image_projections`; projections that are not attached are ignored."""
        self._image_projections = tuple(each for each in self._image_projections if each is not projections)

    def forward(self, x: Tensor, context: Tensor | None = None, image_tokens: Tensor | None = None) -> Tensor:
        """x (B, N, width), context (B, M, context_width), image_tokens (B, K, D) -> (B, N, width)."""
        context = x if context is None else context
        q = self.to_q(x)
        out = attention(q, self.to_k(context), self.to_v(context), self.heads)
        if image_tokens is not None:
            for each in self._image_projections:
                if each.strength:
                    tokens = image_tokens if each.tokens is None else image_tokens[:, each.tokens]
                    added = attention(q, each.to_k_ip(tokens), each.to_v_ip(tokens), self.heads)
                    out = out + each.strength * added
        return self.to_out(out)


class GeGlu(nn.Module):
    """A linear layer whose first half is multiplied by the erf GELU of its second half (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # net.1 was a dropout, which has no weights; the number is kept so that the names match.
        self.net = nn.Sequential(GeGlu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to `context`, feed-forward; each is added to its input."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, image_tokens)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual connection around them.

    `proj_in` and `proj_out` are 1x1 convolutions in SD1 and linear layers in later families: the same arithmetic, but
    files store the weights with different shapes.
    """

    def __init__(self, channels: int, context_width: int, heads: int, depth: int, linear: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear = linear

    def forward(self, x: Tensor, context: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        size = x.shape[-2:]
        tokens = self.norm(x)
        if not self.linear:
            tokens = self.proj_in(tokens)
        tokens = tokens.flatten(2).transpose(1, 2)  # B HW C
        if self.linear:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, image_tokens)
        if self.linear:
            tokens = self.proj_out(tokens)
        out = tokens.transpose(1, 2).unflatten(2, size)  # B C H W
        if not self.linear:
            out = self.proj_out(out)
        return x + out
