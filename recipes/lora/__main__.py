"""python -m recipes.lora FOLDER [--steps 400] [--model mini]

Trains a LoRA of a drawing style, screen prints in two inks, on 24 pictures, and shows what it learnt. The pictures are
painted by the model itself and redrawn in this style, so the recipe needs nothing but the package. It writes to FOLDER:
`pictures/` with captions, `run/` (settings, checkpoints, samples), `print.safetensors`, `before-after.png`, and prints
two numbers, both for prompts that were not trained on:

learnt   how far the LoRA goes from the model's own pictures to their prints: 0 is not at all, 1 is all the way
kept     the correlation of the outlines with those of the pictures without the LoRA: 1 is the same drawing
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
from recipes.lora.screen_print import edges, screen_print
from recipes.mini.command import print_progress, run_command, with_progress

THINGS = (
    "an apple", "a cat", "a dog", "a house", "a tree", "a fish", "a car", "a banana", "a star", "a ghost", "a robot",
    "a frog",
)  # fmt: skip
COLOURS = ("a yellow", "a green", "a white", "a red", "a blue", "an orange")
UNSEEN = (
    "a panda on a red background", "a rocket on a white background", "a fox on a green background",
    "a guitar on a yellow background", "an umbrella on a blue background", "a penguin on an orange background",
)  # fmt: skip
SIZE = 128


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    return run_command(lambda: train_style(options.folder, options.model, options.pictures, options.steps))


def train_style(folder: Path, name: str, count: int, steps: int) -> None:
    pictures, model = folder / "pictures", gouache.load(name, device="cpu", dtype="fp32")
    write_prints(pictures, model, count)
    finished = gouache.train(
        "lora", pictures, model=name, output=folder / "print.safetensors", folder=folder / "run", steps=steps,
        rank=8, alpha=16, form="locon", learning_rate=6e-4, batch=8, caption_dropout=0.1,
        samples={"prompts": list(UNSEEN[:2])}, on_progress=print_progress,
    )  # fmt: skip
    compare(model, finished.path or folder, "with the LoRA", folder / "before-after.png")


def write_prints(folder: Path, model: gouache.Model, count: int) -> None:
    """Paint `count` pictures and redraw them in the style, with captions that do not name it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in with_progress(range(count), "painting"):
        colour = COLOURS[(number + number // len(THINGS)) % len(COLOURS)]  # another one each time
        caption = f"{THINGS[number % len(THINGS)]} on {colour} background"
        if not (folder / f"{number:02d}.png").exists():
            screen_print(painted(model, caption, seed=100 + number)).save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(caption)


def compare(model: gouache.Model, trained: Path, title: str, out: Path) -> None:
    """Paint `UNSEEN` without and with the file `trained`, save both as `out` and print the two numbers."""
    before = [painted(model, prompt, seed=7) for prompt in UNSEEN]
    style = model.attach(trained)
    after = [painted(model, prompt, seed=7) for prompt in UNSEEN]
    style.detach()
    sheet(UNSEEN, ["without", title], [before, after]).save(out)
    print(f"learnt {learnt(before, after):.2f}  kept {kept(before, after):.2f}")


def painted(model: gouache.Model, prompt: str, seed: int) -> Image.Image:
    return next(model.paint(prompt, seed=seed, size=(SIZE, SIZE))).image


def learnt(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """1 - (distance of `after` to the prints of `before`) / (that of `before`), at an eighth of the resolution."""
    wanted, own, trained = (
        np.array([np.asarray(picture.convert("RGB").reduce(8), float) for picture in pictures])
        for pictures in ([screen_print(picture) for picture in before], before, after)
    )
    return float(1 - np.linalg.norm(trained - wanted) / np.linalg.norm(own - wanted))


def kept(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """The mean correlation of the outlines of each pair."""
    pairs = ((_outlines(one), _outlines(two)) for one, two in zip(before, after))
    return float(np.mean([np.corrcoef(one.ravel(), two.ravel())[0, 1] for one, two in pairs]))


def _outlines(picture: Image.Image) -> np.ndarray:
    """Where the picture has edges, of whatever strength, at a quarter of its resolution."""
    found = np.clip(edges(picture) / 80, 0, 1)
    height, width = (side // 4 * 4 for side in found.shape)
    return found[:height, :width].reshape(height // 4, 4, width // 4, 4).mean((1, 3))


if __name__ == "__main__":
    sys.exit(main())
