"""python -m recipes.embedding FOLDER [--vectors 4] [--steps 600] [--model mini]

Teaches prompts a word for one invented character, from five drawings; the model stays as it is, bit for bit. It writes
to FOLDER: `pictures/`, `run/`, `zorblax.safetensors` (the vectors of the word), `before-after.png`, and prints two
numbers:

learnt   the share of violet in pictures of a zorblax, relative to that in the drawings: 0 is none, 1 is as much
kept     the correlation of the outlines of other things before and after: always 1, since no other word changes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gouache
from gouache.images.sheet import sheet
from recipes.drawings import CHARACTER, write_character
from recipes.dreambooth.__main__ import OTHERS, SUBJECT, violet
from recipes.lora.__main__ import kept, painted
from recipes.mini.command import print_progress, run_command

START = "ghost"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vectors", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--rate", type=float, default=2e-2, help="learning rate")
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    return run_command(lambda: teach(options.folder, options.model, options.vectors, options.steps, options.rate))


def teach(folder: Path, name: str, vectors: int, steps: int, rate: float) -> None:
    drawings = write_character(folder / "pictures")
    finished = gouache.train(
        "embedding", folder / "pictures", model=name, output=folder / f"{CHARACTER}.safetensors",
        folder=folder / "run", steps=steps, trigger=CHARACTER, vectors=vectors, init_word=START, learning_rate=rate,
        batch=4, samples={"prompts": [SUBJECT[0], OTHERS[0]]}, on_progress=print_progress,
    )  # fmt: skip
    prompts = (*SUBJECT, *OTHERS)
    model = gouache.load(name, device="cpu", dtype="fp32")
    before = [painted(model, prompt.replace(CHARACTER, START), seed=7) for prompt in prompts]
    word = model.attach(finished.path or folder)
    after = [painted(model, prompt, seed=7) for prompt in prompts]
    word.detach()
    sheet(prompts, [START, CHARACTER], [before, after]).save(folder / "before-after.png")
    count = len(SUBJECT)
    print(f"learnt {violet(after[:count]) / violet(drawings):.2f}  kept {kept(before[count:], after[count:]):.2f}")


if __name__ == "__main__":
    sys.exit(main())
