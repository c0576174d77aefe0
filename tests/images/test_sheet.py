"""Sheets of pictures: the position of every picture and the space for labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from gouache.images.sheet import GAP, LINE, MIN_COLUMN, PAPER, TEXT_SIZE, labelled_tiles, sheet, tiled


def colours(count: int, size: tuple[int, int] = (200, 40)) -> list[Image.Image]:
    return [Image.new("RGB", size, (255, 10 * number, 0)) for number in range(count)]


def boxes(result: Image.Image, count: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each picture of `colours`."""
    pixels = np.asarray(result)
    found = []
    for number in range(count):
        rows, columns = np.nonzero((pixels == (255, 10 * number, 0)).all(axis=2))
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return found


def test_labelled_tiles_are_in_rows_under_their_labels():
    pictures = colours(5)

    result = labelled_tiles(pictures, ["one", "two\nlines", "three", "four", "five"], across=3)

    first, second = GAP + 2 * LINE + GAP // 2, GAP + 2 * LINE + GAP // 2 + 40 + GAP + LINE + GAP // 2
    lefts = [GAP, 2 * GAP + 200, 3 * GAP + 400]
    expected = [(left, first) for left in lefts] + [(left, second) for left in lefts[:2]]
    assert boxes(result, 5) == [(left, top, left + 200, top + 40) for left, top in expected]
    assert result.mode == "RGB" and result.size == (3 * (200 + GAP) + GAP, second + 40 + GAP)
    pixels = np.asarray(result)
    for left, top in expected:  # there is a label above each, and nothing in the empty cell
        assert (pixels[top - LINE : top - GAP // 2, left : left + 200] != PAPER).any()
    assert (pixels[first + 40 :, lefts[2] :] == PAPER).all()


def test_narrow_tiles_get_columns_as_wide_as_their_labels():
    label = "step 10/25, sigma 14.6146"
    length = ImageFont.load_default(TEXT_SIZE).getlength(label)

    (first, second) = boxes(labelled_tiles(colours(2, (32, 32)), [label, label], across=8), 2)

    assert length < MIN_COLUMN
    assert length + GAP <= second[0] - first[0] < length + GAP + 2


def test_tiles_of_different_sizes_are_aligned_at_the_top():
    pictures = [*colours(2, (300, 100))[:1], *colours(2, (64, 20))[1:]]

    result = labelled_tiles(pictures, ["a", "b"], across=2)

    (first, second) = boxes(result, 2)
    assert first[1] == second[1] and first[3] - first[1] == 100 and second[2] - second[0] == 64


def test_fewer_tiles_than_columns_leave_no_empty_columns():
    assert labelled_tiles(colours(2), ["a", "b"], across=8).width == GAP + 2 * (200 + GAP)


@pytest.mark.parametrize("label", ["a few words that do not fit on a line " * 3, "W" * 200, "", "\n\n"])
def test_no_label_is_wider_than_its_column(label: str):
    result = np.asarray(labelled_tiles(colours(2, (100, 10)), [label, "second"], across=2))

    column = max(100, min(MIN_COLUMN, max((len(line) * 12 for line in label.split("\n")), default=0)))
    gap = result[:, GAP + column : GAP + column + GAP - 1]
    assert label.strip() == "" or (gap == PAPER).all()


def test_a_label_is_needed_for_each_picture():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        labelled_tiles(colours(2), ["a"], across=2)


def test_a_table_has_columns_under_their_labels_and_empty_cells():
    first, second, third = colours(3)

    result = sheet(["one", "two"], ["row", "another"], [[first, None], [second, third]])

    width = 200 + GAP
    lefts = [box[0] for box in boxes(result, 3)]
    assert lefts == [GAP + width, GAP + width, GAP + 2 * width]
    assert result.size == (GAP + 3 * width, GAP + LINE + GAP + 2 * (40 + GAP))


def test_tiles_without_labels_are_next_to_each_other():
    result = tiled(colours(3, (20, 10)), across=2)

    assert boxes(result, 3) == [(0, 0, 20, 10), (24, 0, 44, 10), (0, 14, 20, 24)]
