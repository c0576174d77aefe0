"""The first half of the Stable Diffusion U-Net: time embedding, input blocks and middle block.

A ControlNet (Zhang et al. 2023) is a copy of this half with outputs of its own, under the same names, so it shares
this class with `UNet`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gouache.nn.attention import SpatialTransformer
from gouache.nn.blocks import Downsample, ResBlock, Upsample, timestep_embedding
from gouache.nn.spec import UNetSpec


class UNetEncoder(nn.Module):
    """`time_embed`, `label_emb` (if the spec has `vector_channels`), `input_blocks` and `middle_block`.

    `skip_channels[i]` is the number of channels that input block i gives to its skip connection.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        base, embedding = spec.channels, embedding_width(spec)
        self.time_embed = _embedding_mlp(base, embedding)
        if spec.vector_channels:
            self.label_emb = nn.Sequential(_embedding_mlp(spec.vector_channels, embedding))

        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(spec.in_channels, base, 3, padding=1))])
        skip_channels = [base]
        channels = base
        last = len(spec.channel_mult) - 1
        for level, (mult, depth) in enumerate(zip(spec.channel_mult, spec.attention_depth, strict=True)):
            for _ in range(spec.res_blocks):
                block: list[nn.Module] = [ResBlock(channels, embedding, mult * base)]
                channels = mult * base
                if depth:
                    block.append(spatial_transformer(spec, channels, depth))
                self.input_blocks.append(nn.Sequential(*block))
                skip_channels.append(channels)
            if level < last:
                self.input_blocks.append(nn.Sequential(Downsample(channels)))
                skip_channels.append(channels)
        self.skip_channels = tuple(skip_channels)

        self.middle_block = nn.Sequential(
            ResBlock(channels, embedding, channels),
            spatial_transformer(spec, channels, spec.middle_depth),
            ResBlock(channels, embedding, channels),
        )

    def embed(self, t: Tensor, vector: Tensor | None, dtype: torch.dtype) -> Tensor:
        """t (B,), fractions allowed, and vector (B, vector_channels) if the spec has one -> (B, 4 * channels)."""
        emb = self.time_embed(timestep_embedding(t, self.spec.channels).to(dtype))
        return emb + self.label_emb(vector) if self.spec.vector_channels else emb

    def encode(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor,
        *,
        hint: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """x (B, in_channels, H, W) -> the output of each input block, in order, and the middle block's output.

        `emb` comes from `embed`. A ControlNet adds its embedded picture, `hint` (B or 1, channels, H, W), to the
        output of the first input block.
        """
        skips: list[Tensor] = []
        for index, block in enumerate(self.input_blocks):
            x = run_block(block, x, emb, context, image_tokens=image_tokens)
            if hint is not None and index == 0:
                x = x + hint
            skips.append(x)
        return skips, run_block(self.middle_block, x, emb, context, image_tokens=image_tokens)


def embedding_width(spec: UNetSpec) -> int:
    """The width of the embedded time that every residual block receives."""
    return 4 * spec.channels


def spatial_transformer(spec: UNetSpec, channels: int, depth: int) -> SpatialTransformer:
    heads = spec.heads or channels // (spec.head_channels or 64)
    return SpatialTransformer(channels, spec.context_dim, heads, depth, spec.linear_projection)


def run_block(
    block: nn.Module,
    x: Tensor,
    emb: Tensor,
    context: Tensor,
    *,
    size: torch.Size | None = None,
    image_tokens: Tensor | None = None,
) -> Tensor:
    """x through the layers of a block, each with the inputs it takes; `size` is the output size of an Upsample."""
    for layer in block.children():
        if isinstance(layer, ResBlock):
            x = layer(x, emb)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context, image_tokens)
        elif isinstance(layer, Upsample):
            x = layer(x, size)
        else:
            x = layer(x)
    return x


def _embedding_mlp(width: int, embedding: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
