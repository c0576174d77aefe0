"""How good is mini? Paints every prompt of `prompts.txt` with four fixed seeds and has a classifier look.

    python -m recipes.mini.evaluate MODEL [--out FOLDER]        paint, judge, write the contact sheet
    python -m recipes.mini.evaluate --pictures FOLDER           judge pictures that were painted before

No picture is chosen or left out. A subject counts as right when the things that the classifier sees most surely
are just those asked for; a background when the colour of the frame's border lies nearest to the colour asked for.
Both judges are measured on unseen renderings first, and refused below 97 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gouache.errors import GouacheError, RequestError, TrainingError
from recipes.mini.classifier import Classifier, as_input, held_out_accuracy, load_or_train, top
from recipes.mini.contact_sheet import Cell, contact_sheet
from recipes.mini.dataset import CLASSIFIER_HELD_OUT_SEED, sample
from recipes.mini.names import Colour, Thing, load_things, nearest_colour
from recipes.mini.prompts import PROMPTS_FILE, Prompt, noun_pairs, read_prompts
from recipes.mini.rendering import Glyphs, render

SEEDS = (1, 2, 3, 4)  # one after the other, so that a batch paints them
STEPS = 20
LEAST_ACCURACY = 0.97
RUNS = Path("runs/mini")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was seen in the picture of prompt number `prompt` (from 0) with `seed`."""

    prompt: int
    seed: int
    things: tuple[str, ...]
    colour: str
    things_right: bool
    colour_right: bool


def background_of(picture: Image.Image) -> Colour:
    """The named colour nearest to the median of the picture's outermost sixteenth."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    edge = max(1, min(picture.size) // 16)
    border = np.ones(pixels.shape[:2], bool)
    border[edge:-edge, edge:-edge] = False
    return nearest_colour(np.median(pixels[border], axis=0).tolist())


def background_accuracy(things: Sequence[Thing], glyphs: Glyphs, pictures: int = 1024) -> float:
    """The share of unseen scenes with a background of one colour, plain or shaded, for which it is named."""
    right = seen = 0
    for index in range(pictures):
        scene = sample(CLASSIFIER_HELD_OUT_SEED, index, things).scene
        if scene.background.start == scene.background.end:
            right += background_of(render(scene, glyphs)) == scene.background.start
            seen += 1
    return right / seen


def picture_path(folder: Path, prompt: int, seed: int) -> Path:
    """Where the picture of prompt number `prompt` (from 0) lies; numbers in file names count from 1."""
    return folder / f"{prompt + 1:03d}-{seed}.png"


def paint_all(model_path: str, prompts: Sequence[Prompt], folder: Path) -> None:
    """Paint each prompt with each seed into `folder`."""
    import gouache

    model = gouache.load(model_path)
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        for picture in model.paint(prompt.text, seed=SEEDS[0], count=len(SEEDS), batch=len(SEEDS), steps=STEPS):
            picture.image.save(picture_path(folder, number, picture.seed))
        print(f"painted {number + 1} of {len(prompts)}: {prompt.text}", flush=True)


def judge(prompts: Sequence[Prompt], folder: Path, network: Classifier, things: Sequence[Thing]) -> list[Verdict]:
    """A verdict on each picture of `folder`, in the order of prompts and seeds; a missing one is an error."""
    verdicts = []
    for number, prompt in enumerate(prompts):
        pictures = [open_picture(picture_path(folder, number, seed)) for seed in SEEDS]
        seen = top(network, as_input(pictures), len(prompt.things))
        for seed, picture, classes in zip(SEEDS, pictures, seen):
            names, colour = tuple(sorted(things[index].name for index in classes)), background_of(picture).name
            things_right, colour_right = set(names) == set(prompt.things), colour == prompt.colour
            verdicts.append(Verdict(number, seed, names, colour, things_right, colour_right))
    return verdicts


def open_picture(path: Path) -> Image.Image:
    if not path.is_file():
        raise RequestError("pictures", f"{path} is missing; every prompt needs {len(SEEDS)} pictures")
    with Image.open(path) as picture:
        return picture.convert("RGB")


def figures(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares in percent: subjects right, backgrounds right, and noun pairs whose subjects differ."""
    by_prompt = {(verdict.prompt, verdict.seed): verdict for verdict in verdicts}
    pairs = [(by_prompt[i, seed], by_prompt[j, seed]) for i, j in noun_pairs(prompts) for seed in SEEDS]
    one = [verdict for verdict in verdicts if len(prompts[verdict.prompt].things) == 1]
    several = [verdict for verdict in verdicts if len(prompts[verdict.prompt].things) > 1]
    return {
        "subject right": percent([verdict.things_right for verdict in verdicts]),
        "subject right, prompts for one thing": percent([verdict.things_right for verdict in one]),
        "subject right, prompts for two things": percent([verdict.things_right for verdict in several]),
        "background right": percent([verdict.colour_right for verdict in verdicts]),
        "noun pairs: subjects differ": percent([a.things != b.things for a, b in pairs]),
        "noun pairs: both right": percent([a.things_right and b.things_right for a, b in pairs]),
    }


def percent(answers: Sequence[bool]) -> float:
    return round(100 * sum(answers) / len(answers), 1) if answers else 0.0


def report_markdown(
    title: str, prompts: Sequence[Prompt], verdicts: Sequence[Verdict], shares: dict[str, float]
) -> str:
    """The figures, then every prompt with what was seen for each seed, as Markdown tables."""
    lines = [f"# {title}", "", "| figure | % |", "| --- | ---: |"]
    lines += [f"| {name} | {share:.1f} |" for name, share in shares.items()]
    lines += ["", "| prompt | subject right | background right | seen |", "| --- | ---: | ---: | --- |"]
    for number, prompt in enumerate(prompts):
        own = [verdict for verdict in verdicts if verdict.prompt == number]
        things_right, colours_right = (sum(v.things_right for v in own), sum(v.colour_right for v in own))
        seen = "; ".join(f"{' + '.join(verdict.things)} on {verdict.colour}" for verdict in own)
        lines.append(f"| {prompt.text} | {things_right} of {len(own)} | {colours_right} of {len(own)} | {seen} |")
    return "\n".join(lines) + "\n"


def measure_judges(network: Classifier, things: Sequence[Thing], glyphs: Glyphs) -> dict[str, float]:
    """How often each judge is right on unseen renderings, in percent; TrainingError below 97 %."""
    accuracies = {
        "judge of one thing": held_out_accuracy(network, things, glyphs, 1),
        "judge of two things": held_out_accuracy(network, things, glyphs, 2),
        "judge of backgrounds": background_accuracy(things, glyphs),
    }
    for name, accuracy in accuracies.items():
        print(f"{name}: right on {accuracy:.1%} of unseen renderings")
        if accuracy < LEAST_ACCURACY:
            raise TrainingError(
                f"the {name} is right on {accuracy:.1%} of unseen renderings, not on the {LEAST_ACCURACY:.0%}"
                " that its verdicts need; train it longer (STEPS in recipes/mini/classifier.py)"
            )
    return {f"{name}, on unseen renderings": round(100 * accuracy, 1) for name, accuracy in accuracies.items()}


def evaluate(arguments: argparse.Namespace) -> None:
    things, glyphs = load_things(), Glyphs(arguments.font)
    prompts = read_prompts(arguments.prompts)
    network = load_or_train(arguments.classifier, things, glyphs)
    accuracies = measure_judges(network, things, glyphs)

    folder = arguments.pictures
    if folder is None:
        folder = arguments.out / "pictures"
        paint_all(arguments.model, prompts, folder)
    verdicts = judge(prompts, folder, network, things)
    shares = figures(prompts, verdicts) | accuracies

    title = f"{arguments.title}: {len(prompts)} prompts, seeds {', '.join(map(str, SEEDS))}, none left out"
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(
            prompt.text,
            tuple(open_picture(picture_path(folder, number, seed)) for seed in SEEDS),
            tuple((v.things_right, v.colour_right) for v in verdicts if v.prompt == number),
        )
        for number, prompt in enumerate(prompts)
    ]
    contact_sheet(title, cells).save(arguments.out / "contact-sheet.png", optimize=True)
    table = report_markdown(title, prompts, verdicts, shares)
    (arguments.out / "evaluation.md").write_text(table, encoding="utf-8")
    record = {"figures": shares, "verdicts": [asdict(verdict) for verdict in verdicts]}
    (arguments.out / "evaluation.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for name, share in shares.items():
        print(f"{share:5.1f} %  {name}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.mini.evaluate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", nargs="?", default="mini", help="model file, or the name of an embedded model")
    parser.add_argument("--pictures", type=Path, help="judge this folder's NNN-SEED.png instead of painting")
    parser.add_argument("--prompts", type=Path, default=PROMPTS_FILE)
    parser.add_argument("--out", type=Path, default=RUNS / "evaluation", help="folder for sheet, table and figures")
    parser.add_argument("--classifier", type=Path, default=RUNS / "classifier.safetensors", help="where it is kept")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where it is in no usual font folder")
    parser.add_argument("--title", default="mini")
    try:
        evaluate(parser.parse_args())
    except GouacheError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
