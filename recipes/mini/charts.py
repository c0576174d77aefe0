"""Draw charts of a run's logs: python -m recipes.mini.charts FOLDER OUT

Reads the logs of FOLDER/vae, text and unet; writes OUT.jsonl with all validation lines, and OUT.svg with one chart per
stage. Where the measure itself changed during a run, `--break STAGE=STEP` interrupts the curve: values on its two sides
are not comparable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gouache.errors import FileError
from gouache.files.write import write_atomic
from recipes.mini.command import run_command

STAGES = {
    "vae": ("autoencoder: dB on unseen scenes", -1.0),
    "text": ("text encoder: error of the layout, unseen captions", 1.0),
    "unet": ("U-Net: loss on unseen scenes, averaged weights", 1.0),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 190, 44, 12, 30, 26  # of one chart and its margins, in pixels
Points = list[tuple[int, float]]


def validation_lines(folder: Path) -> list[dict[str, float]]:
    """The validation lines of a stage's log, one per step."""
    path = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    return list({line["step"]: line for line in lines if "validation loss" in line}.values())


def chart(title: str, points: Points, left: int, break_step: int | None = None) -> str:
    """SVG of a curve through `points`, interrupted after `break_step`; the chart begins `left` pixels from the edge."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return left + LEFT + width * step / max(steps)

    def y(value: float) -> float:
        return TOP + height * (1 - (value - low) / ((high - low) or 1))

    def polyline(through: Points) -> str:
        vertices = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in through)
        return f'<polyline points="{vertices}" fill="none" stroke="#2a6fdb" stroke-width="1.5"/>'

    segments = [points]
    if break_step is not None:
        segments = [[p for p in points if p[0] <= break_step], [p for p in points if p[0] > break_step]]
    lines = "".join(polyline(segment) for segment in segments)
    if break_step is not None:
        lines += f'<path d="M{x(break_step):.1f},{TOP} v{height}" stroke="#999" stroke-dasharray="3 3"/>'
    labels = [
        f'<text x="{left + LEFT - 4}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.4g}</text>'
        for value in (low, high)
    ]
    labels += [
        f'<text x="{x(step):.0f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:,}</text>'
        for step, anchor in ((0, "start"), (max(steps), "end"))
    ]
    frame = f'<path d="M{left + LEFT},{TOP} v{height} h{width}" fill="none" stroke="#999"/>'
    heading = f'<text x="{left + LEFT}" y="18" font-weight="bold">{title}</text>'
    return f"{heading}{frame}{lines}{''.join(labels)}"


def charts(stages: Sequence[tuple[str, Points, int | None]]) -> str:
    """An SVG document of charts next to each other: (title, points, step after which the curve is interrupted)."""
    body = "\n".join(
        chart(title, points, number * WIDTH, break_step) for number, (title, points, break_step) in enumerate(stages)
    )
    size = f'width="{WIDTH * len(stages)}" height="{HEIGHT}"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="#222">'
        f"\n{paper}\n{body}\n</svg>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--break", dest="breaks", type=_stage_and_step, action="append", default=[], metavar="STAGE=STEP"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: draw(options.folder, options.out, dict(options.breaks)))


def _stage_and_step(text: str) -> tuple[str, int]:
    stage, _, step = text.partition("=")
    if stage not in STAGES or not step.isdigit():
        raise argparse.ArgumentTypeError(f"is {text!r}; expected STAGE=STEP with one of {', '.join(STAGES)}")
    return stage, int(step)


def draw(folder: Path, out: Path, breaks: Mapping[str, int]) -> None:
    logs = {stage: validation_lines(folder / stage) for stage in STAGES}
    lines = [json.dumps({"stage": stage, **line}) for stage, log in logs.items() for line in log]
    write_atomic(out.with_suffix(".jsonl"), ("\n".join(lines) + "\n").encode())
    curves = [
        (title, [(int(line["step"]), sign * line["validation loss"]) for line in logs[stage]], breaks.get(stage))
        for stage, (title, sign) in STAGES.items()
    ]
    write_atomic(out.with_suffix(".svg"), charts(curves).encode())


if __name__ == "__main__":
    sys.exit(main())
