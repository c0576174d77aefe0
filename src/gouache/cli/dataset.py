"""`gouache dataset check|show`: what is in a folder of training pictures, and what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

from gouache.cli.text import shown
from gouache.errors import RequestError, printable
from gouache.outside import json_line
from gouache.wording import plural

if TYPE_CHECKING:
    from gouache.data.check import Finding, Report

app = Typer(help="Check and show training pictures and their captions.", no_args_is_help=True, rich_markup_mode=None)

Data = Annotated[
    Path,
    Argument(
        help="A folder of pictures with captions, kohya's folders or TOML, metadata.jsonl, or webdataset's tar shards.",
        readable=False,
        show_default=False,
    ),
]
Trigger = Annotated[str, Option(help="A word put in front of every caption that does not have it.", show_default=False)]
ClassWord = Annotated[str, Option("--class", help="What the subject is, in one or two words.", show_default=False)]
Regularization = Annotated[
    Path | None, Option("--reg", help="A folder of pictures of the class.", readable=False, show_default=False)
]
Column = Annotated[str, Option(help="The column of metadata that has the captions.", show_default=False)]
Conditions = Annotated[
    list[str] | None,
    Option("--filter", help="Keep pictures by their scores, such as 'punsafe<0.1'; can be repeated."),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]


@app.command()
def check(
    data: Data,
    model: Annotated[
        str, Option("--model", "-m", help="The model to train, for its resolution.", show_default=False)
    ] = "",
    resolution: Annotated[
        str,
        Option(
            help="Of training, in pixels: a side, or WIDTHxHEIGHT.", show_default="the data set's, the model's, 512"
        ),
    ] = "",
    step: Annotated[int | None, Option(help="Sides of buckets are multiples of this.", show_default="64, or 8")] = None,
    upscale: Annotated[
        bool | None, Option("--upscale/--no-upscale", help="Enlarge pictures that are smaller.", show_default="yes")
    ] = None,
    batch: Annotated[int | None, Option(help="Pictures per batch.", show_default="1")] = None,
    max_tokens: Annotated[int, Option(help="Tokens of a caption that other programs use.")] = 75,
    held_out: Annotated[
        Path | None,
        Option("--holdout", help="A folder of pictures held out for validation.", readable=False, show_default=False),
    ] = None,
    trigger: Trigger = "",
    class_word: ClassWord = "",
    regularization: Regularization = None,
    caption_column: Column = "",
    conditions: Conditions = None,
    as_json: AsJson = False,
) -> None:
    """Find pictures that cannot be read, copies, small pictures, captions that are cut off, and what buckets lose.

    Exit code 1 if there are faults.
    """
    from gouache.app.dataset import Source, Training
    from gouache.app.dataset import check as service
    from gouache.app.settings import read
    from gouache.cli.progress import Bar

    for name, value in (("batch", batch), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise RequestError(name, "expected at least 1")
    source = Source(data, trigger, class_word, regularization, caption_column, conditions or ())
    training = Training(model, _size(resolution) if resolution else None, step, upscale, batch)
    with Bar() as bar:
        report = service(source, training, read(), max_tokens=max_tokens, held_out=held_out, on_work=bar.show)
    if as_json:
        print(json_line(report.to_json()))
    else:
        _print(report, data)
    if report.faults:
        sys.exit(1)


@app.command()
def show(
    data: Data,
    output: Annotated[
        Path | None, Option("--output", "-o", help="The .png file to write.", readable=False, show_default=False)
    ] = None,
    count: Annotated[int, Option(help="Pictures on the sheet, evenly chosen from all.")] = 60,
    trigger: Trigger = "",
    class_word: ClassWord = "",
    regularization: Regularization = None,
    caption_column: Column = "",
    conditions: Conditions = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON, one object per picture.")] = False,
) -> None:
    """Draw a sheet of the pictures with their captions, as training will use them."""
    from gouache.app import dataset
    from gouache.app.settings import read

    if output is None and not as_json:
        raise RequestError("output", "is missing; name a .png file with -o, or add --json")
    source = dataset.Source(data, trigger, class_word, regularization, caption_column, conditions or ())
    found = source.read(read(), stream=True)
    if output is not None:
        drawn = dataset.show(found, output, count=count, overwrite=overwrite)
        notes = [f"{shown(output)}: {drawn} of {plural(len(found.records), 'picture')}", *found.notes]
        print("\n".join(notes), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        for record in found.records:
            print(json_line(dataset.to_json(record)))


def _size(text: str) -> tuple[int, int]:
    """ "512" or "768x512" as (width, height)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(each.isascii() and each.isdecimal() and len(each) < 6 for each in sides):
        raise RequestError("resolution", f"is {printable(text, 40)!r}; expected a number of pixels, or WIDTHxHEIGHT")
    return int(sides[0]), int(sides[-1])


def _print(report: Report, data: Path) -> None:
    about = f", {report.regularization} of them of the class" if report.regularization else ""
    print(f"{shown(data)}: {plural(report.pictures, 'picture')}, {report.seen} per epoch{about}")
    for note in report.notes:
        print(f"note: {note}")
    if report.buckets:
        print(f"\n{'size':>11} {'pictures':>9} {'per epoch':>10} {'batches':>8} {'cut off':>8}")
    for bucket in report.buckets:
        size = f"{bucket.size[0]}x{bucket.size[1]}"
        print(f"{size:>11} {bucket.pictures:9} {bucket.seen:10} {bucket.batches:8} {bucket.lost:8.1%}")
    print(f"{plural(report.batches, 'batch', 'batches')} of at most {plural(report.batch, 'picture')} per epoch\n")
    for finding in report.findings:
        print(_line(finding))
    faults, remarks = len(report.faults), len(report.findings) - len(report.faults)
    print(f"{plural(faults, 'fault')}, {plural(remarks, 'remark')}")


def _line(finding: Finding) -> str:
    message = printable(finding.message, 1000)
    names = [printable(name, 100) for name in finding.pictures if printable(name, 100) not in message]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    level = "FAULT " if finding.fault else "remark"
    return f"{level}  {finding.kind}: {message}" + (f": {', '.join(names[:4])}{more}" if names else "")
