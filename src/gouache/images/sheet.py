"""Pictures side by side: with labels, a row a thing compared by, a column a thing compared; or without."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, INK, PAPER = 8, (30, 30, 30), (255, 255, 255)
TEXT_SIZE, LINE = 14, 18  # pixels
SEAM = 4  # pixels between tiles
LEAST = 192  # px: a column is at least so wide, or no label has room


def sheet(columns: Sequence[str], rows: Sequence[str], pictures: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """An RGB picture: `columns` are labels (of several lines) above, `rows` labels left of pictures[row][column].

    None leaves a place empty. Columns are as wide as the widest picture.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    there = [picture for row in pictures for picture in row if picture is not None]
    width = max([LEAST, *(picture.width for picture in there)])
    heads = [_wrapped(label, width) for label in columns]
    sides = [_wrapped(label, width) for label in rows]
    top = GAP + LINE * max(label.count("\n") + 1 for label in heads) + GAP
    heights = [
        max([LINE * (side.count("\n") + 1), *(picture.height for picture in row if picture is not None)])
        for side, row in zip(sides, pictures)
    ]
    size = (GAP + (len(columns) + 1) * (width + GAP), top + sum(height + GAP for height in heights))
    result = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(result)
    lefts = [GAP + (column + 1) * (width + GAP) for column in range(len(columns))]
    for left, label in zip(lefts, heads):
        draw.multiline_text((left, GAP), label, fill=INK, font=font, spacing=LINE - TEXT_SIZE)
    for side, row, height in zip(sides, pictures, heights):
        draw.multiline_text((GAP, top), side, fill=INK, font=font, spacing=LINE - TEXT_SIZE)
        for left, picture in zip(lefts, row):
            if picture is not None:
                result.paste(picture, (left, top))
        top += height + GAP
    return result


def tiled(pictures: Sequence[Image.Image], across: int) -> Image.Image:
    """Pictures of one size without labels, `across` in a row, as an RGB picture; a last row may be short."""
    width, height = pictures[0].size
    down = -(-len(pictures) // across)
    result = Image.new("RGB", (across * (width + SEAM) - SEAM, down * (height + SEAM) - SEAM), PAPER)
    for number, picture in enumerate(pictures):
        result.paste(picture, (number % across * (width + SEAM), number // across * (height + SEAM)))
    return result


def _wrapped(label: str, width: int) -> str:
    across = max(8, int(width / (0.52 * TEXT_SIZE)))
    return "\n".join(line for part in label.splitlines() for line in textwrap.wrap(part, across) or [""])
