"""`gouache train status|report|compare|export`: what a run did, and its result in other forms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.cli.text import shown
from gouache.cli.train import Overwrite, app, note
from gouache.errors import RequestError
from gouache.outside import json_line

Run = Annotated[Path, Argument(help="The folder of a run.", show_default=False)]


@app.command()
def status(run: Run, as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Show what a run has done, how stable it is, and what needs a look."""
    from gouache.app.training import stage_status
    from gouache.app.training.folder import opened
    from gouache.app.training.stage_file import has_stages
    from gouache.app.training.status import status as service

    if has_stages(run):
        every = stage_status.all_status(run)
        for text in [json_line([each.to_json() for each in every], indent=1)] if as_json else stage_status.lines(every):
            print(text)
        return
    found = service(opened(run))
    if as_json:
        print(json_line(found.to_json(), indent=1))
        return
    for line in found.lines():
        print(line)
    for remark in found.remarks:
        print(f"note  {remark}")
    for change in found.changes:
        print(f"changed  {change}")


@app.command()
def report(
    run: Run,
    output: Annotated[Path, Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write curves, samples, settings and changes as one HTML file that needs nothing else."""
    from gouache.app.training.stage_file import has_stages
    from gouache.app.training.stage_status import all_status

    every = all_status(run) if has_stages(run) else []
    _report([str(each.stage.folder.path) for each in every if each.status is not None] or [str(run)], output)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        Argument(metavar="RUN[@STEP]", help="Folders of runs; @STEP, @best or @last for a checkpoint.",
                 show_default=False),
    ],
    output: Annotated[Path, Option("--output", "-o", help="The HTML file to write.")] = Path("comparison.html"),
) -> None:  # fmt: skip
    """Set runs or checkpoints side by side: settings that differ, curves, samples with equal seeds."""
    if len(runs) < 2:
        raise RequestError("runs", "expected at least two runs to compare, or two checkpoints as RUN@STEP")
    _report(runs, output)


@app.command()
def export(
    run: Run,
    output: Annotated[Path, Argument(metavar="OUT", help="The file to write.", show_default=False)],
    step: Annotated[str, Option(help="The step of a checkpoint, best or last.")] = "last",
    weights: Annotated[str, Option(help="ema, last or both.", show_default="ema if kept")] = "",
    form: Annotated[str, Option(help="adapter, full, pruned or pruned-emaonly.", show_default="adapter, or full")] = "",
    names: Annotated[str, Option(help="Names in adapter files: kohya, peft or diffusers.")] = "kohya",
    overwrite: Overwrite = False,
) -> None:
    """Write a run's weights as a file that other tools read."""
    from gouache.app.settings import read
    from gouache.app.training import export as service
    from gouache.app.training.folder import opened

    used = service.export(
        opened(run), output, read(), step=step, weights=weights, form=form, names=names, overwrite=overwrite,
        on_note=note,
    )  # fmt: skip
    print(shown(output))
    print(f"weights of step {used}", file=sys.stderr)


def _report(runs: list[str], output: Path) -> None:
    from gouache.app.training.report import entry
    from gouache.app.training.report import report as service
    from gouache.files.write import write_atomic
    from gouache.workshop.save import writing

    if output.suffix.lower() not in (".html", ".htm"):
        raise RequestError("output", f"{shown(output)} does not end in .html; this command writes a page")
    page = service([entry(each) for each in runs])
    with writing(output, True):
        write_atomic(output, page.encode())
    print(shown(output))
