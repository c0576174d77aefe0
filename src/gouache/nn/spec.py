"""The parameters that a network is built from. Frozen, so that specs can be compared and used as keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """The U-Net of SD1, SD2 and SDXL; names follow the original configurations.

    `attention_depth[i]` is the number of transformer blocks in each spatial transformer of level i, 0 for none;
    `middle_depth`, at least 1, the same for the middle block. Either `heads` (SD1: 8 everywhere) or `head_channels`
    (all later families: 64) is set. `vector_channels` is the width of the extra vector (SDXL's `adm`), 0 for none.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    attention_depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    heads: int | None = 8
    head_channels: int | None = None
    context_dim: int = 768
    linear_projection: bool = False
    vector_channels: int = 0


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """The KL autoencoder: `channels * channel_mult[i]` features at level i, each level half the size of the last."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """A CLIP text tower, with the names of Transformers. `projection` is the width of the pooled vector, None for no
    projection layer.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    vocabulary: int = 49408
    positions: int = 77
    activation: str = "quick_gelu"  # OpenAI's CLIP; OpenCLIP has "gelu" (the erf form)
    projection: int | None = None


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """A CLIP image tower, with the names of Transformers."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    image_size: int = 224
    patch_size: int = 14
    activation: str = "quick_gelu"
    projection: int | None = 768


@dataclass(frozen=True, kw_only=True)
class TinyVaeSpec:
    """TAESD, and which of its two halves are present."""

    channels: int = 64
    latent_channels: int = 4
    encoder: bool = True
    decoder: bool = True

    @property
    def factor(self) -> int:
        return 8
