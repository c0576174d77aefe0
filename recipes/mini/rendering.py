"""Rendering of scenes: colour glyphs of an emoji font, scaled, rotated and pasted over a background.

The font's bitmaps are read once, cropped to their content and cached, so that a picture of 128 px takes a millisecond.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gouache.errors import RequestError
from recipes.mini.names import Colour
from recipes.mini.scenes import Background, PlacedThing, Scene

FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/opt/homebrew/share/fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)
STRIKE = 109  # the only size, in pixels, that the font has bitmaps of


def find_font(font: Path | None = None) -> Path:
    """`font` if given, else Noto Color Emoji from the usual font folders; RequestError if there is none."""
    if font is not None:
        if not font.is_file():
            raise RequestError("font", f"there is no file {font}; expected {FONT_NAME}")
        return font
    for folder in FONT_FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return path
    raise RequestError(
        "font",
        f"{FONT_NAME} is not in any of the usual font folders; install the package fonts-noto-color-emoji"
        " (Debian, Ubuntu), google-noto-emoji-color-fonts (Fedora) or noto-fonts-emoji (Arch), or pass --font FILE",
    )


class Glyphs:
    """The font's bitmaps by glyph: RGBA with premultiplied colour, cropped to their content, read at first use."""

    def __init__(self, font: Path | None = None) -> None:
        self.path = find_font(font)
        try:
            self._font = ImageFont.truetype(str(self.path), STRIKE, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise RequestError(
                "font", f"{self.path} cannot be used ({error}); expected {FONT_NAME} with bitmaps of size {STRIKE}"
            ) from error
        self._bitmaps: dict[str, Image.Image] = {}

    def __getitem__(self, glyph: str) -> Image.Image:
        if glyph not in self._bitmaps:
            canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
            ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), glyph, font=self._font, embedded_color=True)
            box = canvas.getchannel("A").getbbox()
            if box is None:
                raise RequestError("font", f"{self.path} has no colour bitmap for {glyph!r}; use a newer {FONT_NAME}")
            cropped = canvas.crop(box)
            # Pillow blends the text with transparent black, so these bytes are already premultiplied by alpha.
            self._bitmaps[glyph] = Image.frombytes("RGBa", cropped.size, cropped.tobytes())
        return self._bitmaps[glyph]


def render(scene: Scene, glyphs: Glyphs, size: int = 128) -> Image.Image:
    """The RGB picture of `scene`, `size` pixels square; later things are pasted over earlier ones."""
    picture = _render_background(scene.background, size)
    for placed in scene.things:
        _paste(picture, placed, glyphs[placed.thing.glyph])
    return picture


def _paste(picture: Image.Image, placed: PlacedThing, bitmap: Image.Image) -> None:
    scale = placed.size * picture.width / max(bitmap.size)
    if placed.tint is not None:
        bitmap = tinted(bitmap, placed.tint)
    if placed.flip:
        bitmap = bitmap.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placed.angle:
        bitmap = bitmap.rotate(placed.angle, Image.Resampling.BICUBIC, expand=True)
    width, height = (max(1, round(side * scale)) for side in bitmap.size)
    # Scaled after rotation: the resize averages over source pixels, so small things have smooth edges.
    bitmap = bitmap.resize((width, height), Image.Resampling.HAMMING).convert("RGBA")
    corner = round(placed.x * picture.width - width / 2), round(placed.y * picture.height - height / 2)
    picture.paste(bitmap, corner, bitmap)


LUMA = np.array([0.30, 0.59, 0.11], np.float32)


def tinted(bitmap: Image.Image, colour: Colour) -> Image.Image:
    """A premultiplied glyph, recoloured: pixels of median brightness get `colour`, others a lighter or darker shade."""
    pixels = np.asarray(bitmap, np.float32)
    alpha = pixels[..., 3:]
    bright = pixels[..., :3] @ LUMA / np.maximum(alpha[..., 0], 1)
    median = np.median(bright[alpha[..., 0] > 127])
    amount = np.clip(bright - median, -0.6, 0.6)[..., None]
    rgb = np.asarray(colour.rgb, np.float32)
    recoloured = rgb + np.abs(amount) * (np.where(amount > 0, 255.0, 0.0) - rgb)
    rgba = np.concatenate([recoloured * alpha / 255, alpha], 2)
    return Image.frombytes("RGBa", bitmap.size, np.rint(rgba).astype(np.uint8).tobytes())


def shade(colour: Colour, amount: float) -> np.ndarray:
    """`colour` mixed with white (amount > 0) or black (amount < 0) in the proportion |amount|: (3,) float32, 0..255."""
    rgb = np.asarray(colour.rgb, np.float32)
    return rgb + abs(amount) * ((255.0 if amount > 0 else 0.0) - rgb)


def _render_background(background: Background, size: int) -> Image.Image:
    if not background.direction:
        return Image.new("RGB", (size, size), background.start.rgb)
    if background.start == background.end:
        start, end = shade(background.start, -0.15), shade(background.end, 0.15)
    else:
        start, end = shade(background.start, 0.0), shade(background.end, 0.0)
    line = np.linspace(0.0, 1.0, size, dtype=np.float32)
    ramps = {
        "vertical": np.broadcast_to(line[:, None], (size, size)),
        "horizontal": np.broadcast_to(line[None, :], (size, size)),
        "diagonal": (line[:, None] + line[None, :]) / 2,
    }
    ramp = ramps[background.direction][..., None]
    return Image.fromarray(np.rint(start + ramp * (end - start)).astype(np.uint8))
