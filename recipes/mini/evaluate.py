"""Evaluate mini: paint every prompt of `prompts.txt` and `prompts_more.txt` with four fixed seeds, judge the pictures.

    python -m recipes.mini.evaluate MODEL [--out FOLDER]        paint, judge, write the contact sheet
    python -m recipes.mini.evaluate --pictures FOLDER           judge pictures that were painted before

No picture is selected or left out. A subject is right if the things with the largest gain (see `matching`) are exactly
the requested ones; a background if the colour of the frame's border is nearest to the requested colour; a recoloured
subject if also the thing's median colour is nearest to the requested one; two things on their sides if also they are
found where they were requested. All judges are first measured on unseen renderings; see `LEAST_ACCURACY`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import gouache
from gouache.errors import RequestError, TrainingError
from recipes.mini.command import run_command, with_progress
from recipes.mini.contact_sheet import Cell, contact_sheet
from recipes.mini.dataset import JUDGE_SEED, TRAINING_SEED, sample
from recipes.mini.image_measures import SAME_DISTANCE, background_rgb, distances, thing_colour, thumbnails
from recipes.mini.matching import Match, Matcher
from recipes.mini.names import COLOURS, Colour, Thing, load_things, nearest_colour
from recipes.mini.prompts import MORE_PROMPTS_FILE, PROMPTS_FILE, Prompt, noun_pairs, read_prompts
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import TRAINING, UNIFORM

SEEDS = (1, 2, 3, 4)  # consecutive, so that one batch paints them
STEPS = 20
CFG = 7.0  # the published numbers were measured with it
LEAST_ACCURACY = 0.97  # of every judge
LEAST_ACCURACY_TWO = 0.95  # of the judge of two things, which must be right twice
RENDERINGS = 20_000  # training pictures that painted pictures are compared with
RUNS = Path("runs/mini")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judges found in the picture of prompt number `prompt` (from 0) with `seed`."""

    prompt: int
    seed: int
    things: tuple[str, ...]
    colour: str
    things_right: bool
    colour_right: bool
    tint: str = ""  # the thing's colour, where the prompt requests one
    sides_right: bool | None = None  # None where the prompt requests no sides


def background_of(picture: Image.Image) -> Colour:
    """The named colour nearest to that of the picture's border."""
    return nearest_colour(background_rgb(picture).tolist())


def background_accuracy(things: Sequence[Thing], glyphs: Glyphs, pictures: int = 1024) -> float:
    """The share of unseen scenes with a background of one colour, plain or shaded, where that colour is found."""
    right = total = 0
    for index in range(pictures):
        scene = sample(JUDGE_SEED, index, things).scene
        if scene.background.start == scene.background.end:
            right += background_of(render(scene, glyphs)) == scene.background.start
            total += 1
    return right / total


def tint_accuracy(things: Sequence[Thing], glyphs: Glyphs, pictures: int = 512) -> float:
    """The share of unseen scenes of one recoloured thing on a plain background where its colour is found."""
    scenes = replace(UNIFORM, count_weights=(1.0, 0.0, 0.0), tinted=1.0, gradients=0.0)
    right = 0
    for index in range(pictures):
        scene = sample(JUDGE_SEED, index, things, scenes).scene
        right += thing_colour(render(scene, glyphs)) == scene.things[0].tint
    return right / pictures


def things_accuracy(things: Sequence[Thing], glyphs: Glyphs, count: int, tint: Colour | None, pictures: int) -> float:
    """The share of unseen scenes of `count` things on a plain background where all are found, on the right sides."""
    scenes = replace(
        UNIFORM,
        count_weights=(float(count == 1), float(count == 2), 0.0),
        gradients=0.0,
        tinted=float(tint is not None),
    )
    matcher = Matcher(things, glyphs, tint)
    unseen = (sample(JUDGE_SEED, index, things, scenes).scene for index in range(100 * pictures))
    selected = [scene for scene in unseen if scene.things[0].tint == tint][:pictures]
    right = 0
    for scene in selected:
        matches = matcher.find(render(scene, glyphs), count)
        names = tuple(placed.thing.name for placed in scene.things)
        side = "beside" if scene.things[0].x < scene.things[-1].x - 0.3 else "over"
        right += {things[each.thing].name for each in matches} == set(names) and (
            count == 1 or are_arranged(matches, things, names, side)
        )
    return right / len(selected)


def are_arranged(matches: Sequence[Match], things: Sequence[Thing], names: Sequence[str], side: str) -> bool:
    """Whether the first named of two things was found left of ("beside") or above ("over") the other."""
    by_name = {things[each.thing].name: each for each in matches}
    if len(names) != 2 or not by_name.keys() >= set(names):
        return False
    first, second = (by_name[name] for name in names)
    return bool(first.x < second.x - 0.2 if side == "beside" else first.y < second.y - 0.2)


def variety(prompts: Sequence[Prompt], folder: Path, things: Sequence[Thing], glyphs: Glyphs) -> dict[str, float]:
    """Percentages: of prompts whose pictures all differ; of pictures that copy a training picture."""
    differ, copies = [], []
    # Rendered at the size of training and then reduced, as the pictures are: rendered small, a scene looks different.
    scenes = (sample(TRAINING_SEED, index, things, TRAINING).scene for index in range(RENDERINGS))
    trained = torch.cat([thumbnails([render(scene, glyphs)]) for scene in scenes])
    for number in range(len(prompts)):
        painted = thumbnails([open_picture(picture_path(folder, number, seed)) for seed in SEEDS])
        apart = distances(painted, painted) + torch.eye(len(painted))
        differ.append(bool(apart.min() > SAME_DISTANCE))
        copies.extend((distances(painted, trained).min(1).values < SAME_DISTANCE).tolist())
    return {"prompts whose seeds differ": percent(differ), "copies of a training rendering": percent(copies)}


def picture_path(folder: Path, prompt: int, seed: int) -> Path:
    """The path of the picture of prompt number `prompt` (from 0); numbers in file names count from 1."""
    return folder / f"{prompt + 1:03d}-{seed}.png"


def paint_all(model: gouache.Model, prompts: Sequence[Prompt], folder: Path) -> None:
    """Paint each prompt with each seed into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in with_progress(list(enumerate(prompts)), "painted"):
        pictures = model.paint(prompt.text, seed=SEEDS[0], count=len(SEEDS), batch=len(SEEDS), steps=STEPS, cfg=CFG)
        for picture in pictures:
            picture.image.save(picture_path(folder, number, picture.seed))


def judge(prompts: Sequence[Prompt], folder: Path, things: Sequence[Thing], glyphs: Glyphs) -> list[Verdict]:
    """A verdict per picture of `folder`, in the order of prompts and seeds; RequestError if a picture is missing."""
    verdicts = []
    tints = {colour.name: colour for colour in COLOURS}
    # One matcher at a time: one with a tint needs twice the memory.
    for tint in sorted({prompt.tint for prompt in prompts}):
        matcher = Matcher(things, glyphs, tints.get(tint))
        selected = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.tint == tint]
        for number, prompt in with_progress(selected, f"judged, tint {tint or 'none'}"):
            for seed in SEEDS:
                picture = open_picture(picture_path(folder, number, seed))
                matches = matcher.find(picture, len(prompt.things))
                names, colour = tuple(sorted(things[each.thing].name for each in matches)), background_of(picture).name
                right = set(names) == set(prompt.things)
                verdict = Verdict(number, seed, names, colour, right, colour == prompt.colour)
                if tint:
                    found = thing_colour(picture)
                    verdict = replace(verdict, tint=found.name if found else "")
                if prompt.side:
                    sides = right and are_arranged(matches, things, prompt.things, prompt.side)
                    verdict = replace(verdict, sides_right=sides)
                verdicts.append(verdict)
    return sorted(verdicts, key=lambda verdict: (verdict.prompt, verdict.seed))


def open_picture(path: Path) -> Image.Image:
    if not path.is_file():
        raise RequestError("pictures", f"{path} is missing; every prompt needs {len(SEEDS)} pictures, NNN-SEED.png")
    with Image.open(path) as picture:
        return picture.convert("RGB")


def figures(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Percentages of what the prompts request: subjects, sides, colours, backgrounds, and noun pairs that differ."""
    by_prompt = {(verdict.prompt, verdict.seed): verdict for verdict in verdicts}
    pairs = [(by_prompt[i, seed], by_prompt[j, seed]) for i, j in noun_pairs(prompts) for seed in SEEDS]
    one = [verdict for verdict in verdicts if len(prompts[verdict.prompt].things) == 1]
    several = [verdict for verdict in verdicts if len(prompts[verdict.prompt].things) > 1]
    tinted = [verdict for verdict in verdicts if prompts[verdict.prompt].tint]
    sided = [verdict for verdict in verdicts if verdict.sides_right is not None]
    answers = {
        "subject right": [verdict.things_right for verdict in verdicts],
        "subject right, prompts for one thing": [verdict.things_right for verdict in one],
        "subject right, prompts for two things": [verdict.things_right for verdict in several],
        "two things on the right sides": [bool(verdict.sides_right) for verdict in sided],
        "recoloured thing right": [v.things_right for v in tinted],
        "recoloured thing right, in its colour": [v.things_right and v.tint == prompts[v.prompt].tint for v in tinted],
        "background right": [verdict.colour_right for verdict in verdicts],
        "noun pairs: subjects differ": [a.things != b.things for a, b in pairs],
        "noun pairs: both right": [a.things_right and b.things_right for a, b in pairs],
    }
    return {name: percent(each) for name, each in answers.items() if each}  # without what no prompt requests


def percent(answers: Sequence[bool]) -> float:
    return round(100 * sum(answers) / len(answers), 1)


def report_markdown(
    title: str, prompts: Sequence[Prompt], verdicts: Sequence[Verdict], shares: dict[str, float]
) -> str:
    """The figures, then every prompt with what was found for each seed, as Markdown tables."""
    lines = [f"# {title}", "", "| figure | % |", "| --- | ---: |"]
    lines += [f"| {name} | {share:.1f} |" for name, share in shares.items()]
    lines += ["", "| prompt | subject right | background right | found |", "| --- | ---: | ---: | --- |"]
    for number, prompt in enumerate(prompts):
        of_prompt = [verdict for verdict in verdicts if verdict.prompt == number]
        things_right, colours_right = (sum(v.things_right for v in of_prompt), sum(v.colour_right for v in of_prompt))
        found = "; ".join(f"{' + '.join(verdict.things)} on {verdict.colour}" for verdict in of_prompt)
        count = len(of_prompt)
        lines.append(f"| {prompt.text} | {things_right} of {count} | {colours_right} of {count} | {found} |")
    return "\n".join(lines) + "\n"


def measure_judges(things: Sequence[Thing], glyphs: Glyphs) -> dict[str, float]:
    """How often each judge is right on unseen renderings, in percent; TrainingError if that is not often enough."""
    accuracies = {
        "judge of one thing": things_accuracy(things, glyphs, 1, None, 200),
        "judge of one thing, green": things_accuracy(things, glyphs, 1, COLOURS[3], 100),
        "judge of two things and their sides": things_accuracy(things, glyphs, 2, None, 100),
        "judge of backgrounds": background_accuracy(things, glyphs),
        "judge of a thing's colour": tint_accuracy(things, glyphs),
    }
    for name, accuracy in accuracies.items():
        print(f"{name}: right on {accuracy:.1%} of unseen renderings", flush=True)
        least = LEAST_ACCURACY_TWO if "two" in name else LEAST_ACCURACY
        if accuracy < least:
            raise TrainingError(
                f"the {name} is right on {accuracy:.1%} of unseen renderings; expected at least {least:.0%}"
            )
    return {f"{name}, on unseen renderings": round(100 * accuracy, 1) for name, accuracy in accuracies.items()}


def evaluate(arguments: argparse.Namespace) -> None:
    things, glyphs = load_things(), Glyphs(arguments.font)
    prompts = [prompt for path in arguments.prompts for prompt in read_prompts(path)]
    # Load the model first: an error must not come after the judges were measured, which takes minutes.
    model = gouache.load(arguments.model) if arguments.pictures is None else None
    accuracies = measure_judges(things, glyphs)

    folder = arguments.pictures or arguments.out / "pictures"
    if model is not None:
        paint_all(model, prompts, folder)
    verdicts = judge(prompts, folder, things, glyphs)
    shares = figures(prompts, verdicts)
    first = len(read_prompts())
    if arguments.prompts[0] == PROMPTS_FILE and len(prompts) > first:
        of_first = figures(prompts[:first], verdicts[: first * len(SEEDS)])
        shares |= {f"{name}, of the first {first} prompts": share for name, share in of_first.items()}
    shares |= variety(prompts, folder, things, glyphs) | accuracies

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
    parser.add_argument("--pictures", type=Path, help="judge the NNN-SEED.png of this folder instead of painting")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[PROMPTS_FILE, MORE_PROMPTS_FILE])
    parser.add_argument(
        "--out", type=Path, default=RUNS / "evaluation", help="folder for the contact sheet, the table and the figures"
    )
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in a usual font folder")
    parser.add_argument("--title", default="mini")
    arguments = parser.parse_args()
    return run_command(lambda: evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())
