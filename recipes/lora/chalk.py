"""A drawing style: white chalk outlines on a blackboard, made from any picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

BOARD = (38, 64, 52)
CHALK = (238, 236, 224)
FILL = 0.18  # how strongly the picture's colours are rubbed into the board


def chalk(picture: Image.Image) -> Image.Image:
    """The same picture as a chalk drawing."""
    colours = np.asarray(picture.convert("RGB"), np.float32)
    lines = np.clip(1.5 * _blurred(np.clip((edges(picture) - 20) / 60, 0, 1), 0.7), 0, 1)[..., None]
    board = np.array(BOARD, np.float32) + FILL * (colours - 128)
    drawn = board * (1 - lines) + np.array(CHALK, np.float32) * lines
    return Image.fromarray(np.rint(np.clip(drawn, 0, 255)).astype(np.uint8))


def edges(picture: Image.Image) -> np.ndarray:
    """The largest change of a colour at each pixel (H, W), 0 to about 360; 0 at the border."""
    smooth = np.asarray(picture.convert("RGB").filter(ImageFilter.GaussianBlur(1)), np.float32)
    across = np.zeros(smooth.shape[:2], np.float32)
    down = across.copy()
    across[:, 1:-1] = np.abs(smooth[:, 2:] - smooth[:, :-2]).max(2)
    down[1:-1] = np.abs(smooth[2:] - smooth[:-2]).max(2)
    return np.hypot(across, down)


def _blurred(values: np.ndarray, radius: float) -> np.ndarray:
    grey = Image.fromarray(np.rint(255 * values).astype(np.uint8))
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
