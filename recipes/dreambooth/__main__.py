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
from random import Random

import numpy as np
from PIL import Image

import gouache
from gouache.images.sheet import sheet
from recipes.adapters.pictures import CHARACTER, character
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
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    drawings = [character(Random(seed)) for seed in range(5)]
    for number, (picture, caption) in enumerate(drawings):
        picture.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    finished = gouache.train(
        "dreambooth", pictures, model=name, output=folder / "zorblax.safetensors", folder=folder / "run", steps=steps,
        trigger=CHARACTER, class_word=CLASS, class_pictures=class_pictures, form="none", text_encoder=True,
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
    share = violet(after[:count]) / violet([picture for picture, _ in drawings])
    print(f"learnt {share:.2f}  kept {kept(before[count:], after[count:]):.2f}")


def violet(pictures: Sequence[Image.Image]) -> float:
    """The mean share of pixels whose colour is near the character's."""
    levels = (np.asarray(picture.convert("RGB"), np.int16) for picture in pictures)
    return float(np.mean([(np.abs(each - VIOLET).max(2) < 40).mean() for each in levels]))


if __name__ == "__main__":
    sys.exit(main())
