from __future__ import annotations

from collections import Counter

from gouache.layouts.blocks import block_of, blocks
from gouache.layouts.original import unet_shapes
from gouache.nn.spec import UNetSpec

SDXL = UNetSpec(channel_mult=(1, 2, 4), attention_depth=(0, 2, 10), middle_depth=10, vector_channels=2816)


def test_sd1_has_the_25_blocks_of_block_weighted_merging():
    labels = [block.label for block in blocks(UNetSpec())]

    assert labels == [f"IN{n:02}" for n in range(12)] + ["M00"] + [f"OUT{n:02}" for n in range(12)]


def test_sdxl_has_the_19_blocks_of_its_three_levels():
    labels = [block.label for block in blocks(SDXL)]

    assert labels == [f"IN{n:02}" for n in range(9)] + ["M00"] + [f"OUT{n:02}" for n in range(9)]


def test_the_meaning_of_a_block_agrees_with_its_tensors():
    for spec in (UNetSpec(), SDXL):
        names = list(unet_shapes(spec))
        for block in blocks(spec):
            inside = [name.removeprefix(block.prefix) for name in names if name.startswith(block.prefix)]
            assert inside
            assert ("transformer" in block.meaning) == any("transformer_blocks" in name for name in inside)
            assert ("halves" in block.meaning) == any(name.startswith("0.op.") for name in inside)
            assert ("doubles" in block.meaning) == any(".conv.weight" in name for name in inside)


def test_every_tensor_is_assigned_to_one_block_as_in_merging_tools():
    table = blocks(UNetSpec())

    counts = Counter(block_of(name, table) for name in unet_shapes(UNetSpec()))

    assert set(counts) == {block.label for block in table}
    assert block_of("time_embed.0.weight", table) == "IN00"
    assert block_of("out.2.weight", table) == "OUT11"
    assert block_of("input_blocks.1.0.in_layers.0.weight", table) == "IN01"
    assert block_of("input_blocks.11.0.in_layers.0.weight", table) == "IN11"
