"""The U-Net of Stable Diffusion 1, 2 and XL, under the names of the original single files.

One network serves them all: what differs is in `UNetSpec`. Rombach et al. 2022, Podell et al. 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gouache.nn.attention import SpatialTransformer
from gouache.nn.blocks import Downsample, ResBlock, Upsample, timestep_embedding
from gouache.nn.spec import UNetSpec


class UNet(nn.Module):
    """Predicts noise (or v) from a noisy latent, its time and what the prompt says.

    `label_emb` exists where the spec has `vector_channels`, as in SDXL.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        base, time = spec.channels, 4 * spec.channels

        def embed(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def transformer(channels: int, depth: int) -> SpatialTransformer:
            heads = spec.heads or channels // (spec.head_channels or 64)
            return SpatialTransformer(channels, spec.context_dim, heads, depth, spec.linear_projection)

        self.time_embed = embed(base)
        if spec.vector_channels:
            self.label_emb = nn.Sequential(embed(spec.vector_channels))

        # Going down, the width of every map is noted: going up, each is joined again to the map of its size.
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(spec.in_channels, base, 3, padding=1))])
        widths = [base]
        channels = base
        last = len(spec.channel_mult) - 1
        for level, (mult, depth) in enumerate(zip(spec.channel_mult, spec.attention_depth, strict=True)):
            for _ in range(spec.res_blocks):
                block: list[nn.Module] = [ResBlock(channels, time, mult * base)]
                channels = mult * base
                if depth:
                    block.append(transformer(channels, depth))
                self.input_blocks.append(nn.Sequential(*block))
                widths.append(channels)
            if level < last:
                self.input_blocks.append(nn.Sequential(Downsample(channels)))
                widths.append(channels)

        self.middle_block = nn.Sequential(
            ResBlock(channels, time, channels),
            transformer(channels, spec.middle_depth),
            ResBlock(channels, time, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            depth = spec.attention_depth[level]
            for index in range(spec.res_blocks + 1):
                block: list[nn.Module] = [ResBlock(channels + widths.pop(), time, spec.channel_mult[level] * base)]
                channels = spec.channel_mult[level] * base
                if depth:
                    block.append(transformer(channels, depth))
                if level and index == spec.res_blocks:
                    block.append(Upsample(channels))
                self.output_blocks.append(nn.Sequential(*block))

        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, spec.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W); t (B,) the time, fractions allowed; context (B, N, context_dim);
        vector (B, vector_channels) where the spec has one. Returns (B, out_channels, H, W).
        """
        emb = self.time_embed(timestep_embedding(t, self.spec.channels).to(x.dtype))
        if self.spec.vector_channels:
            emb = emb + self.label_emb(vector)

        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = _through(block, x, emb, context)
            skips.append(x)
        x = _through(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            skip = skips.pop()
            size = skips[-1].shape[-2:] if skips else skip.shape[-2:]
            x = _through(block, torch.cat([x, skip], dim=1), emb, context, size)
        return self.out(x)


def _through(block: nn.Module, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
    """x through the layers of a block, each handed what it asks for; `size` is where an Upsample leads."""
    for layer in block.children():
        if isinstance(layer, ResBlock):
            x = layer(x, emb)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context)
        elif isinstance(layer, Upsample):
            x = layer(x, size)
        else:
            x = layer(x)
    return x
