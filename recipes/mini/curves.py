"""Draw what a run's logs tell: python -m recipes.mini.curves FOLDER OUT

Reads FOLDER/vae, text and unet; writes OUT.jsonl, all validations line by line, and OUT.svg, a chart of each stage.
Where what is measured changed within a run, `--anew STAGE=STEP` breaks its line: its two sides are not to be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gouache.errors import FileError
from gouache.files.write import write_atomic
from recipes.mini.command import ended

STAGES = {
    "vae": ("autoencoder: dB on unseen scenes", -1.0),
    "text": ("text encoder: error of the canvas, unseen captions", 1.0),
    "unet": ("U-Net: loss on unseen scenes, averaged weights", 1.0),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 190, 44, 12, 30, 26  # of one chart and its margins, in pixels
Points = list[tuple[int, float]]


def validated(folder: Path) -> list[dict[str, float]]:
    """The lines of a stage's log that tell of a validation, each step once."""
    path = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    return list({line["step"]: line for line in lines if "validation loss" in line}.values())


def chart(title: str, points: Points, left: int, anew: int | None = None) -> str:
    """A line through `points`, broken after step `anew`, as SVG, its frame `left` pixels from the picture's edge."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return left + LEFT + wide * step / max(steps)

    def y(value: float) -> float:
        return TOP + tall * (1 - (value - low) / ((high - low) or 1))

    def line(through: Points) -> str:
        drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in through)
        return f'<polyline points="{drawn}" fill="none" stroke="#2a6fdb" stroke-width="1.5"/>'

    parts = [points] if anew is None else [[p for p in points if p[0] <= anew], [p for p in points if p[0] > anew]]
    lines = "".join(line(part) for part in parts)
    if anew is not None:
        lines += f'<path d="M{x(anew):.1f},{TOP} v{tall}" stroke="#999" stroke-dasharray="3 3"/>'
    labels = [
        f'<text x="{left + LEFT - 4}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.4g}</text>'
        for value in (low, high)
    ]
    labels += [
        f'<text x="{x(step):.0f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:,}</text>'
        for step, anchor in ((0, "start"), (max(steps), "end"))
    ]
    frame = f'<path d="M{left + LEFT},{TOP} v{tall} h{wide}" fill="none" stroke="#999"/>'
    head = f'<text x="{left + LEFT}" y="18" font-weight="bold">{title}</text>'
    return f"{head}{frame}{lines}{''.join(labels)}"


def charts(stages: Sequence[tuple[str, Points, int | None]]) -> str:
    drawn = "\n".join(chart(title, points, number * WIDTH, anew) for number, (title, points, anew) in enumerate(stages))
    size = f'width="{WIDTH * len(stages)}" height="{HEIGHT}"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="#222">'
        f"\n{paper}\n{drawn}\n</svg>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--anew", type=_stage_and_step, action="append", default=[], metavar="STAGE=STEP")
    options = parser.parse_args(arguments)
    return ended(lambda: draw(options.folder, options.out, dict(options.anew)))


def _stage_and_step(text: str) -> tuple[str, int]:
    stage, _, step = text.partition("=")
    if stage not in STAGES or not step.isdigit():
        raise argparse.ArgumentTypeError(f"is {text!r}; expected one of {', '.join(STAGES)}, '=', and a step")
    return stage, int(step)


def draw(folder: Path, out: Path, anew: Mapping[str, int]) -> None:
    logs = {stage: validated(folder / stage) for stage in STAGES}
    lines = [json.dumps({"stage": stage, **line}) for stage, log in logs.items() for line in log]
    write_atomic(out.with_suffix(".jsonl"), ("\n".join(lines) + "\n").encode())
    drawn = [
        (title, [(int(line["step"]), sign * line["validation loss"]) for line in logs[stage]], anew.get(stage))
        for stage, (title, sign) in STAGES.items()
    ]
    write_atomic(out.with_suffix(".svg"), charts(drawn).encode())


if __name__ == "__main__":
    sys.exit(main())
