"""A drawing style: screen prints in two inks on cream paper, made from any picture of a thing on a plain background."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

PAPER = (244, 236, 216)
INKS = ((222, 92, 62), (30, 44, 78))  # for the middle tones and the dark ones


def screen_print(picture: Image.Image) -> Image.Image:
    """The same picture as a print: background and light parts are paper, the others flat ink."""
    colours = np.asarray(picture.convert("RGB").filter(ImageFilter.GaussianBlur(1)), np.float32)
    background = np.median(np.concatenate([colours[:8].reshape(-1, 3), colours[-8:].reshape(-1, 3)]), axis=0)
    thing = _step(np.abs(colours - background).max(2), 35, 60)
    grey = colours @ np.array([0.3, 0.59, 0.11], np.float32)
    middle, dark = _step(grey, 220, 190), _step(grey, 100, 70)
    inks = np.array(PAPER) + middle * (np.array(INKS[0]) - PAPER) + dark * (np.array(INKS[1]) - INKS[0])
    return Image.fromarray(np.rint(np.array(PAPER) + thing * (inks - PAPER)).astype(np.uint8))


def edges(picture: Image.Image) -> np.ndarray:
    """The largest change of a colour at each pixel (H, W), 0 to about 360; 0 at the border."""
    smooth = np.asarray(picture.convert("RGB").filter(ImageFilter.GaussianBlur(1)), np.float32)
    across = np.zeros(smooth.shape[:2], np.float32)
    down = across.copy()
    across[:, 1:-1] = np.abs(smooth[:, 2:] - smooth[:, :-2]).max(2)
    down[1:-1] = np.abs(smooth[2:] - smooth[:-2]).max(2)
    return np.hypot(across, down)


def _step(values: np.ndarray, zero: float, one: float) -> np.ndarray:
    """(H, W, 1): 0 up to `zero`, 1 from `one` on, linear in between."""
    return np.clip((values - zero) / (one - zero), 0, 1)[..., None]
