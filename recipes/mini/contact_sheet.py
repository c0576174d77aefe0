"""A contact sheet of all pictures, failures included, with their prompts and marks for the judges' verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

THUMB, GAP, MARK = 72, 4, 5
COLUMNS = 3
LABEL_LINES, LINE_HEIGHT, TEXT_SIZE = 2, 13, 11
INK, RIGHT, WRONG = (30, 30, 30), (30, 140, 60), (205, 40, 40)
LEGEND = (
    "Bars under a picture: subject on the left, background on the right; solid green is right, hollow red is wrong."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A prompt's pictures and, per picture, whether (subject, background) are right."""

    label: str
    pictures: tuple[Image.Image, ...]
    marks: tuple[tuple[bool, bool], ...]


def contact_sheet(title: str, cells: Sequence[Cell]) -> Image.Image:
    """The sheet as an RGB picture: `title` and a legend, then the cells row by row."""
    font = ImageFont.load_default(TEXT_SIZE)
    across = max(len(cell.pictures) for cell in cells)
    cell_width = across * (THUMB + GAP) + 3 * GAP
    cell_height = LABEL_LINES * LINE_HEIGHT + THUMB + MARK + 4 * GAP
    header = 2 * LINE_HEIGHT + 3 * GAP
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width + GAP, header + rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((2 * GAP, GAP), f"{title}\n{LEGEND}", fill=INK, font=font, spacing=2)
    for index, cell in enumerate(cells):
        left, top = 2 * GAP + index % COLUMNS * cell_width, header + index // COLUMNS * cell_height
        lines = textwrap.wrap(f"{index + 1}. {cell.label}", cell_width // 6)[:LABEL_LINES]
        draw.multiline_text((left, top), "\n".join(lines), fill=INK, font=font, spacing=2)
        top += LABEL_LINES * LINE_HEIGHT + GAP
        for picture, marks in zip(cell.pictures, cell.marks):
            sheet.paste(picture.resize((THUMB, THUMB), Image.Resampling.LANCZOS), (left, top))
            for half, right in enumerate(marks):
                x, y = left + half * (THUMB // 2) + 1, top + THUMB + 2
                box = (x, y, x + THUMB // 2 - 3, y + MARK)
                draw.rectangle(box, fill=RIGHT if right else None, outline=RIGHT if right else WRONG)
            left += THUMB + GAP
    return sheet
