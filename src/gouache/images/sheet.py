"""Pictures arranged on one sheet: as a table with labelled rows and columns, or as tiles with or without labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (30, 30, 30), (255, 255, 255)
GAP = 8  # pixels around labels and between labelled pictures
SEAM = 4  # pixels between tiles without labels
TEXT_SIZE, LINE = 14, 18  # pixels
MIN_COLUMN = 192  # pixels; narrower columns have no room for labels


def sheet(columns: Sequence[str], rows: Sequence[str], pictures: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """A table as an RGB picture: labels `columns` above and `rows` to the left of pictures[row][column].

    Labels may have several lines. None leaves a cell empty. Columns are as wide as the widest picture.
    """
    present = [picture for row in pictures for picture in row if picture is not None]
    width = max([MIN_COLUMN, *(picture.width for picture in present)])
    heads = [_wrapped(label, width) for label in columns]
    sides = [_wrapped(label, width) for label in rows]
    top = GAP + _height(heads) + GAP
    heights = [
        max([_height([side]), *(picture.height for picture in row if picture is not None)])
        for side, row in zip(sides, pictures)
    ]
    size = (GAP + (len(columns) + 1) * (width + GAP), top + sum(height + GAP for height in heights))
    result = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(result)
    lefts = [GAP + (column + 1) * (width + GAP) for column in range(len(columns))]
    for left, label in zip(lefts, heads):
        _write(draw, (left, GAP), label)
    for side, row, height in zip(sides, pictures, heights):
        _write(draw, (GAP, top), side)
        for left, picture in zip(lefts, row):
            if picture is not None:
                result.paste(picture, (left, top))
        top += height + GAP
    return result


def labelled_tiles(pictures: Sequence[Image.Image], labels: Sequence[str], across: int) -> Image.Image:
    """Pictures as an RGB picture, row by row with `across` in a row, each under its label.

    The last row may be shorter. Sizes may differ; labels may have several lines and are wrapped to the column.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    longest = max(font.getlength(line) for label in labels for line in label.split("\n"))
    width = max(*(picture.width for picture in pictures), min(MIN_COLUMN, int(longest) + 1))
    wrapped = [_wrapped(label, width) for label in labels]
    cells = list(zip(pictures, wrapped, strict=True))
    rows = [cells[first : first + across] for first in range(0, len(cells), across)]
    heads = [_height([label for _, label in row]) for row in rows]
    heights = [max(picture.height for picture, _ in row) for row in rows]
    columns = min(across, len(cells))
    down = sum(head + GAP // 2 + height + GAP for head, height in zip(heads, heights))
    size = (GAP + columns * (width + GAP), GAP + down)
    result = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(result)
    top = GAP
    for row, head, height in zip(rows, heads, heights):
        for column, (picture, label) in enumerate(row):
            left = GAP + column * (width + GAP)
            _write(draw, (left, top + head - _height([label])), label)
            result.paste(picture, (left, top + head + GAP // 2))
        top += head + GAP // 2 + height + GAP
    return result


def tiled(pictures: Sequence[Image.Image], across: int) -> Image.Image:
    """Pictures of one size without labels, `across` in a row, as an RGB picture; the last row may be shorter."""
    width, height = pictures[0].size
    down = -(-len(pictures) // across)
    result = Image.new("RGB", (across * (width + SEAM) - SEAM, down * (height + SEAM) - SEAM), PAPER)
    for number, picture in enumerate(pictures):
        result.paste(picture, (number % across * (width + SEAM), number // across * (height + SEAM)))
    return result


def _write(draw: ImageDraw.ImageDraw, position: tuple[int, int], label: str) -> None:
    draw.multiline_text(position, label, fill=INK, font=ImageFont.load_default(TEXT_SIZE), spacing=LINE - TEXT_SIZE)


def _height(labels: Sequence[str]) -> int:
    """The height of the tallest label, in pixels."""
    return LINE * max(label.count("\n") + 1 for label in labels)


def _wrapped(label: str, width: int) -> str:
    """`label` with line breaks between words so that it is at most `width` pixels wide; longer words are cut."""
    font = ImageFont.load_default(TEXT_SIZE)
    lines: list[str] = []
    for part in label.splitlines():
        line = ""
        for word in part.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width:
                fitting = 1
                while font.getlength(line[: fitting + 1]) <= width:
                    fitting += 1
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return "\n".join(lines)
