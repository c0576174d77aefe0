"""python -m recipes.lora FOLDER [--steps 300] [--model mini]

Trains a LoRA of a drawing style, night, on 24 pictures, and shows what it learnt. The pictures are painted by the model
itself and darkened, so the recipe needs nothing but the package. It writes to FOLDER: `pictures/` with captions,
`run/` (settings, checkpoints, samples), `night.safetensors`, `before-after.png`, and prints two numbers:

learnt   how much of the way from the model's own pictures to their nightly forms the LoRA goes, on prompts that were
         not trained on: 0 is none, 1 is all of it
kept     the correlation of light and dark between the pictures with and without the LoRA: 1 is the same drawing
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
from recipes.adapters.pictures import night
from recipes.mini.command import run_command, with_progress

THINGS = ("apple", "cat", "dog", "house", "tree", "fish", "car", "banana", "star", "ghost", "robot", "frog")
COLOURS = ("yellow", "green", "white", "red", "blue", "orange")
UNSEEN = (
    "a panda on a red background", "a rocket on a white background", "a fox on a green background",
    "a guitar on a yellow background", "an umbrella on a blue background", "a penguin on an orange background",
)  # fmt: skip
SIZE = 128


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    return run_command(lambda: train_style(options.folder, options.model, options.pictures, options.steps))


def train_style(folder: Path, name: str, count: int, steps: int) -> None:
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    model = gouache.load(name, device="cpu", dtype="fp32")
    for number in with_progress(range(count), "painting"):
        caption = f"a {THINGS[number % len(THINGS)]} on a {COLOURS[number % len(COLOURS)]} background"
        if not (pictures / f"{number:02d}.png").exists():
            night(painted(model, caption, seed=100 + number)).save(pictures / f"{number:02d}.png")
            (pictures / f"{number:02d}.txt").write_text(caption)
    finished = gouache.train(
        "lora", pictures, model=name, output=folder / "night.safetensors", folder=folder / "run", steps=steps,
        rank=8, form="locon", learning_rate=6e-4, batch=4, samples={"prompts": list(UNSEEN[:2])},
        on_progress=lambda each: print(f"step {each.step}/{each.steps}  loss {each.losses['loss']:.4f}  "
                                       f"{each.left:.0f} s left", file=sys.stderr, flush=True),
    )  # fmt: skip
    before = [painted(model, prompt, seed=7) for prompt in UNSEEN]
    style = model.attach(finished.path or folder / "night.safetensors")
    after = [painted(model, prompt, seed=7) for prompt in UNSEEN]
    style.detach()
    sheet(UNSEEN, ["without", "with the LoRA"], [before, after]).save(folder / "before-after.png")
    print(f"learnt {learnt(before, after):.2f}  kept {kept(before, after):.2f}")


def painted(model: gouache.Model, prompt: str, seed: int) -> Image.Image:
    return next(model.paint(prompt, seed=seed, size=(SIZE, SIZE))).image


def learnt(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """1 - (distance of `after` to the nightly forms of `before`) / (that of `before`), by mean colours."""
    wanted = np.array([_mean(night(picture)) for picture in before])
    own, trained = (np.array([_mean(picture) for picture in each]) for each in (before, after))
    return float(1 - np.linalg.norm(trained - wanted) / np.linalg.norm(own - wanted))


def kept(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """The mean correlation of the grey levels of each pair."""
    pairs = (
        (np.asarray(one.convert("L"), float), np.asarray(two.convert("L"), float)) for one, two in zip(before, after)
    )
    return float(np.mean([np.corrcoef(one.ravel(), two.ravel())[0, 1] for one, two in pairs]))


def _mean(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), float).mean((0, 1))


if __name__ == "__main__":
    sys.exit(main())
