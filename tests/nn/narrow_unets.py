"""Narrow U-Nets of each family, as ours and as diffusers' with the same random weights."""

from __future__ import annotations

from gouache.layouts.diffusers import unet_rules
from gouache.layouts.rules import plan
from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet

from .narrow import scramble

PLAIN, ATTENDING = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

# Each family twice: our spec, and the configuration of its diffusers folder.
SD1 = (
    UNetSpec(channels=32, channel_mult=(1, 2, 4, 4), heads=8, context_dim=24),
    # In diffusers' configuration of SD1, attention_head_dim is the number of heads.
    {"attention_head_dim": 8, "cross_attention_dim": 24},
)
SD2 = (
    UNetSpec(
        channels=32, channel_mult=(1, 2, 4, 4), heads=None, head_channels=16, context_dim=40, linear_projection=True
    ),
    {"attention_head_dim": [2, 4, 8, 8], "cross_attention_dim": 40, "use_linear_projection": True},
)
SDXL = (
    UNetSpec(
        channels=32,
        channel_mult=(1, 2, 4),
        attention_depth=(0, 2, 3),
        middle_depth=3,
        heads=None,
        head_channels=16,
        context_dim=48,
        linear_projection=True,
        vector_channels=20 + 6 * 256,
    ),
    {
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 3],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 20 + 6 * 256,
    },
)
REFINER = (
    UNetSpec(
        channels=32,
        channel_mult=(1, 2, 4, 4),
        attention_depth=(0, 2, 2, 0),
        middle_depth=2,
        heads=None,
        head_channels=16,
        context_dim=40,
        linear_projection=True,
        vector_channels=20 + 5 * 256,
    ),
    {
        "attention_head_dim": [2, 4, 8, 8],
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 20 + 5 * 256,
    },
)
FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "refiner": REFINER}


def unet_pair(spec: UNetSpec, config: dict):
    """(ours, theirs) with equal weights, renamed by the layout table."""
    from diffusers import UNet2DConditionModel

    blocks = [ATTENDING if depth else PLAIN for depth in spec.attention_depth]
    theirs = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[spec.channels * mult for mult in spec.channel_mult],
        down_block_types=[down for down, _ in blocks],
        up_block_types=[up for _, up in reversed(blocks)],
        **config,
    )
    scramble(theirs)
    weights = theirs.state_dict()
    table = unet_rules([depth > 0 for depth in spec.attention_depth], spec.res_blocks)
    ours = UNet(spec)
    ours.load_state_dict(
        {name: origin.tensor(weights.__getitem__) for name, origin in plan(table, weights).origins.items()}
    )
    return ours.eval(), theirs
