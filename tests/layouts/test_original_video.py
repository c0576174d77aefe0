"""The generated names and shapes of Stable Video Diffusion, compared with the official key list and built networks."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

from gouache.layouts.diffusers_video import video_unet_rules, video_vae_rules
from gouache.layouts.original_video import video_unet_shapes, video_vae_shapes, vision_shapes
from gouache.layouts.rules import plan
from gouache.layouts.vision import OPENCLIP_VISION
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import UNetSpec, VaeSpec, VisionSpec

from .manifests import shapes
from .test_diffusers_video import moved, shapes_of, vae_shapes
from .test_vision import VISUAL

UNET = UNetSpec(
    in_channels=8, heads=None, head_channels=64, context_dim=1024, linear_projection=True, vector_channels=768
)
VIT_H = VisionSpec(width=1280, layers=32, heads=16, mlp_width=5120, activation="gelu", projection=1024)


def test_names_and_shapes_are_those_of_the_official_file():
    assert video_unet_shapes(UNET) == shapes("svd", "model.diffusion_model.")
    assert video_vae_shapes(VaeSpec()) == vae_shapes()
    visual = shapes("svd", VISUAL)
    origins = plan(OPENCLIP_VISION, visual).origins
    assert vision_shapes(VIT_H) == {name: origin.shape(visual) for name, origin in origins.items()}


@pytest.mark.parametrize(("depths", "blocks"), [((0, 2), 1), ((1, 0, 2), 2)], ids=str)
def test_a_unet_of_other_widths_and_depths_has_diffusers_shapes(depths, blocks):
    widths = (32, 64, 96)[: len(depths)]
    with torch.device("meta"):
        theirs = shapes_of(
            UNetSpatioTemporalConditionModel(
                block_out_channels=widths,
                down_block_types=tuple(f"{'CrossAttn' * bool(n)}DownBlockSpatioTemporal" for n in depths),
                up_block_types=tuple(f"{'CrossAttn' * bool(n)}UpBlockSpatioTemporal" for n in reversed(depths)),
                num_attention_heads=(1,) * len(depths),
                layers_per_block=blocks,
                cross_attention_dim=16,
                transformer_layers_per_block=tuple(n or 1 for n in depths),
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24,
            )
        )
    spec = UNetSpec(
        in_channels=8, channels=32, channel_mult=(1, 2, 3)[: len(depths)], res_blocks=blocks, attention_depth=depths,
        middle_depth=depths[-1] or 1, context_dim=16, linear_projection=True, vector_channels=24,
    )  # fmt: skip

    assert video_unet_shapes(spec) == moved(video_unet_rules([bool(n) for n in depths], blocks), theirs)


def test_an_autoencoder_of_other_widths_has_diffusers_shapes():
    with torch.device("meta"):
        theirs = shapes_of(
            AutoencoderKLTemporalDecoder(
                block_out_channels=(32, 64, 96), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=2,
                latent_channels=6,
            )
        )  # fmt: skip

    ours = video_vae_shapes(VaeSpec(channels=32, channel_mult=(1, 2, 3), latent_channels=6))
    assert ours == moved(video_vae_rules(3), theirs)


@pytest.mark.parametrize("projection", [None, 48])
def test_the_built_image_encoder_has_exactly_these_names_and_shapes(projection):
    spec = VisionSpec(width=64, layers=3, heads=1, mlp_width=96, image_size=28, projection=projection)

    with torch.device("meta"):
        assert shapes_of(ClipVision(spec)) == vision_shapes(spec)
