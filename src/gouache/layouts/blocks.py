"""Labels IN00 to OUT11 of the blocks of a U-Net, and what each block does.

They are the labels of block-weighted merging and of LoRA block weights: `input_blocks.4` is IN04, the middle is M00.
SD1 and SD2 have IN00-IN11, M00, OUT00-OUT11; SDXL has three levels, hence IN00-IN08 and OUT00-OUT08.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gouache.nn.spec import UNetSpec


@dataclass(frozen=True)
class Block:
    """`label`, such as IN04; `prefix` of its tensors in the U-Net; `scale`: its downsampling factor from the latent."""

    label: str
    prefix: str
    scale: int
    meaning: str


def blocks(spec: UNetSpec) -> tuple[Block, ...]:
    """Every block of a U-Net, in the order in which data passes through them."""
    last = len(spec.channel_mult) - 1
    found = [Block("IN00", "input_blocks.0.", 1, "first convolution")]
    for level, depth in enumerate(spec.attention_depth):
        for _ in range(spec.res_blocks):
            found.append(_numbered("IN", "input_blocks", len(found), level, depth))
        if level < last:
            number = len(found)
            found.append(Block(f"IN{number:02}", f"input_blocks.{number}.", 2**level, "halves the size"))
    found.append(Block("M00", "middle_block.", 2**last, _meaning(spec.middle_depth) + ", residual"))
    number = 0
    for level in range(last, -1, -1):
        for index in range(spec.res_blocks + 1):
            block = _numbered("OUT", "output_blocks", number, level, spec.attention_depth[level])
            if level and index == spec.res_blocks:
                block = Block(block.label, block.prefix, block.scale, block.meaning + ", doubles the size")
            found.append(block)
            number += 1
    return tuple(found)


def block_of(name: str, table: Sequence[Block]) -> str:
    """The label of the block in `table` (`blocks(spec)`) that the U-Net tensor `name` belongs to.

    Tensors outside the blocks are assigned as merging tools do: time and vector embeddings to the first block, the
    output convolution to the last.
    """
    if name.startswith(("time_embed.", "label_emb.")):
        return table[0].label
    return next((block.label for block in table if name.startswith(block.prefix)), table[-1].label)


def _numbered(side: str, prefix: str, number: int, level: int, depth: int) -> Block:
    return Block(f"{side}{number:02}", f"{prefix}.{number}.", 2**level, _meaning(depth))


def _meaning(depth: int) -> str:
    return f"residual, transformer of {depth}" if depth else "residual"
