#!/usr/bin/env python3
"""Make the small emoji font that the tests of recipes/ draw with: scripts/make_test_font.py NotoColorEmoji.ttf

Takes a full Noto Color Emoji with bitmaps (CBDT, the form that Pillow reads; Debian's package fonts-noto-color-emoji
has it) and writes to tests/fonts/ the glyphs of some rows of recipes/mini/names.toml, and a list of them. The same
input gives the same bytes. Needs fonttools, which nothing else here uses, so a throw-away environment is enough:

    python3 -m venv /tmp/fonttools && /tmp/fonttools/bin/pip install fonttools
    /tmp/fonttools/bin/python scripts/make_test_font.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from fontTools import subset  # pyright: ignore[reportMissingImports]
from fontTools.ttLib import TTFont  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "fonts"
FIRST = 24  # the first rows: tests name some of these things
EVERY = 20  # and every so many rows of the whole list, for variety
MOST_BYTES = 400_000


def main(source: str) -> int:
    rows = tomllib.loads((ROOT / "recipes" / "mini" / "names.toml").read_text(encoding="utf-8"))["things"]
    chosen = [row for number, row in enumerate(rows) if number < FIRST or number % EVERY == 0]

    options = subset.Options()
    options.layout_features = []  # every glyph is one character: no ligatures needed
    options.drop_tables += ["GSUB", "vhea", "vmtx"]
    options.name_IDs = [0, 1, 2, 3, 4, 5, 6, 13, 14]  # copyright, names, version and licence stay in the file
    options.recalc_timestamp = False
    font = TTFont(source, recalcTimestamp=False)
    if "CBDT" not in font:
        print(f"error: {source} has no CBDT bitmaps; expected the bitmap form of Noto Color Emoji", file=sys.stderr)
        return 2
    missing = [row["name"] for row in chosen if ord(row["glyph"]) not in font.getBestCmap()]
    if missing:
        print(f"error: {source} has no glyph for {', '.join(missing)}; use a newer version", file=sys.stderr)
        return 2
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[ord(row["glyph"]) for row in chosen])
    subsetter.subset(font)
    target = FOLDER / "NotoColorEmoji-subset.ttf"
    font.save(target)
    lines = [f"{row['glyph']}\t{row['name']}\n" for row in chosen]
    (FOLDER / "glyphs.txt").write_text("".join(lines), encoding="utf-8")

    size = target.stat().st_size
    print(f"{target.relative_to(ROOT)}: {len(chosen)} glyphs, {size:,} bytes")
    if size > MOST_BYTES:
        print(f"error: larger than {MOST_BYTES:,} bytes; choose fewer rows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} NotoColorEmoji.ttf", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))
