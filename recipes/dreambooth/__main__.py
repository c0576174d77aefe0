"""python -m recipes.dreambooth FOLDER [--steps 400] [--model mini]

Teaches a model one invented character, a zorblax, from five drawings, and shows that the rest was kept. It writes to
FOLDER: `pictures/`, `run/`, `zorblax.safetensors` (a whole model, because a new word has to be learnt by the text
encoder too), `before-after.png`, and prints two numbers:

learnt   the share of violet in pictures of a zorblax, relative to that in the drawings: 0 is none, 1 is as much
kept     the correlation of the outlines of other things before and after: 1 is the same drawing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import gouache
from gouache.images.sheet import sheet
from recipes.drawings import CHARACTER, write_character
from recipes.lora.__main__ import kept, painted
from recipes.mini.command import print_progress, run_command

SUBJECT = tuple(f"a {CHARACTER} on a {colour} background" for colour in ("green", "white", "yellow"))
OTHERS = ("a cat on a red background", "an apple on a blue background", "a house on a white background")
VIOLET = (138, 66, 196)
CLASS = "a ghost"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--class-pictures", type=int, default=12)
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    return run_command(lambda: teach(options.folder, options.model, options.class_pictures, options.steps))


def teach(folder: Path, name: str, class_pictures: int, steps: int) -> None:
    drawings = write_character(folder / "pictures")
    finished = gouache.train(
        "dreambooth", folder / "pictures", model=name, output=folder / "zorblax.safetensors", folder=folder / "run",
        steps=steps, trigger=CHARACTER, class_word=CLASS, class_pictures=class_pictures, form="none", text_encoder=True,
        learning_rate=1e-4, batch=2, samples={"prompts": [SUBJECT[0], OTHERS[0]]},
        on_progress=print_progress,
    )  # fmt: skip
    prompts = (*SUBJECT, *OTHERS)
    before, after = (
        [painted(model, prompt, seed=7) for prompt in prompts]
        for model in (gouache.load(each, device="cpu", dtype="fp32") for each in (name, finished.path or ""))
    )
    sheet(prompts, ["before", "after"], [before, after]).save(folder / "before-after.png")
    count = len(SUBJECT)
    share = violet(after[:count]) / violet(drawings)
    print(f"learnt {share:.2f}  kept {kept(before[count:], after[count:]):.2f}")


def violet(pictures: Sequence[Image.Image]) -> float:
    """The mean share of pixels of about the character's hue, whatever their brightness."""
    levels = (np.asarray(picture.convert("RGB").convert("HSV"), np.int16) for picture in pictures)
    hue = np.asarray(Image.new("RGB", (1, 1), VIOLET).convert("HSV"))[0, 0, 0]
    return float(np.mean([((abs(h - hue) < 18) & (s > 80) & (v > 60)).mean() for h, s, v in map(_channels, levels)]))


def _channels(levels: np.ndarray) -> np.ndarray:
    return levels.transpose(2, 0, 1)


if __name__ == "__main__":
    sys.exit(main())
