"""The U-Net of Stable Diffusion 1, 2 and XL, under the names of the original single files.

One network serves all families; `UNetSpec` holds the differences. Rombach et al. 2022, Podell et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gouache.errors import ModelError
from gouache.nn.blocks import ResBlock, Upsample
from gouache.nn.spec import UNetSpec
from gouache.nn.unet_encoder import UNetEncoder, embedding_width, run_block, spatial_transformer


class UNet(UNetEncoder):
    """Predicts noise (or v) from a noisy latent, its timestep and the conditioning.

    `label_emb` exists if the spec has `vector_channels`, as in SDXL.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__(spec)
        base, embedding = spec.channels, embedding_width(spec)
        widths = list(self.skip_channels)
        channels = widths[-1]
        self.output_blocks = nn.ModuleList()
        for level in range(len(spec.channel_mult) - 1, -1, -1):
            depth = spec.attention_depth[level]
            for index in range(spec.res_blocks + 1):
                block: list[nn.Module] = [ResBlock(channels + widths.pop(), embedding, spec.channel_mult[level] * base)]
                channels = spec.channel_mult[level] * base
                if depth:
                    block.append(spatial_transformer(spec, channels, depth))
                if level and index == spec.res_blocks:
                    block.append(Upsample(channels))
                self.output_blocks.append(nn.Sequential(*block))

        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, spec.out_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """x (B, in_channels, H, W); t (B,) the timestep, fractions allowed; context (B, N, context_dim);
        vector (B, vector_channels) if the spec has one. Returns (B, out_channels, H, W).

        `control` holds a ControlNet's residuals, already scaled: one for the output of each input block, in order,
        then one for the middle block (SD1 and SD2: 12 + 1, SDXL: 9 + 1), each of the shape of that output. They are
        added to the skip connections and to the middle block's output. `image_tokens` (B, M, D) go to every
        cross-attention, which uses them only through the projections attached by an image prompt adapter
        (`CrossAttention.attach_image_projections`). Raises ModelError if either does not fit.
        """
        if control is not None and len(control) != len(self.input_blocks) + 1:
            raise ModelError(
                f"received {len(control)} control residuals, expected {len(self.input_blocks) + 1}: one per input "
                f"block and one for the middle block; use a ControlNet made for this model family"
            )
        if image_tokens is not None and (image_tokens.ndim != 3 or len(image_tokens) != len(x)):
            raise ModelError(
                f"the image tokens have shape {tuple(image_tokens.shape)}, expected ({len(x)}, tokens, width): one row "
                f"per latent of the batch"
            )
        emb = self.embed(t, vector, x.dtype)
        skips, x = self.encode(x, emb, context, image_tokens=image_tokens)
        if control is not None:
            _check_shapes(control, [*skips, x])
            x = x + control[-1]
        for block in self.output_blocks:
            skip = skips.pop()
            if control is not None:
                skip = skip + control[len(skips)]
            size = skips[-1].shape[-2:] if skips else skip.shape[-2:]
            x = run_block(block, torch.cat([x, skip], dim=1), emb, context, size=size, image_tokens=image_tokens)
        return self.out(x)


def _check_shapes(control: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    # A residual with a dimension of size 1 would be broadcast without an error.
    for index, (residual, output) in enumerate(zip(control, outputs, strict=True)):
        if residual.shape != output.shape:
            name = f"input block {index}" if index < len(outputs) - 1 else "the middle block"
            raise ModelError(
                f"the control residual for {name} has shape {tuple(residual.shape)}, expected {tuple(output.shape)}; "
                f"the ControlNet must match the model family, the size and the batch"
            )
