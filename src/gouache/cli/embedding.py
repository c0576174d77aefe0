"""`gouache embedding merge`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from gouache.cli.text import shown
from gouache.outside import json_line
from gouache.wording import plural

app = Typer(help="Combine textual inversion embeddings.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Combine textual inversion embeddings."""


@app.command()
def merge(
    embeddings: Annotated[
        list[str],
        Argument(metavar="FILE[:STRENGTH]... OUT", help="Embeddings, then the file to write.", show_default=False),
    ],
    how: Annotated[
        str, Option(help="join (concatenate all vectors) or mean (average them, weighted by strength).")
    ] = "join",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Combine several embeddings into one."""
    from gouache.app.settings import read
    from gouache.cli.strengths import strengths
    from gouache.errors import RequestError
    from gouache.workshop.embedding import combine

    if len(embeddings) < 3:
        raise RequestError("embeddings", "name at least two embeddings, then the file to write")
    target = Path(embeddings[-1])
    done = combine(strengths(embeddings[:-1], read()), target, how, overwrite=overwrite)
    if as_json:
        print(json_line({"path": str(target), **asdict(done)}))
        return
    widths = " and ".join(map(str, done.widths.values()))
    print(f"{shown(target)}: {plural(done.vectors, 'vector')} of width {widths}")
