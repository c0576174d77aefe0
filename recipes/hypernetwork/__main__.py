"""python -m recipes.hypernetwork FOLDER [--steps 400] [--model mini]

Trains a hypernetwork of a drawing style, screen prints in two inks: the pictures and the measures are those of
`recipes.lora`. It writes to FOLDER: `pictures/` with captions, `run/`, `print.pt`, which AUTOMATIC1111's web UI reads,
`before-after.png`, and prints two numbers for prompts that were not trained on:

learnt   how far the pictures go from the model's own to their prints: 0 is not at all, 1 is all the way
kept     the correlation of the outlines with those of the pictures without it: 1 is the same drawing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gouache
from recipes.lora.__main__ import UNSEEN, compare, write_prints
from recipes.mini.command import print_progress, run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    return run_command(
        lambda: train_style(options.folder, options.model, options.pictures, options.steps, options.rate)
    )


def train_style(folder: Path, name: str, count: int, steps: int, rate: float) -> None:
    pictures, model = folder / "pictures", gouache.load(name, device="cpu", dtype="fp32")
    write_prints(pictures, model, count)
    finished = gouache.train(
        "hypernetwork", pictures, model=name, output=folder / "print.pt", folder=folder / "run", steps=steps,
        learning_rate=rate, batch=4, hypernetwork={"structure": [1, 2, 1], "activation": "swish"},
        samples={"prompts": list(UNSEEN[:2])}, on_progress=print_progress,
    )  # fmt: skip
    compare(model, finished.path or folder, "with the hypernetwork", folder / "before-after.png")


if __name__ == "__main__":
    sys.exit(main())
