"""`gouache vae bake|extract`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from gouache.cli.text import shown
from gouache.outside import json_line
from gouache.wording import plural

app = Typer(help="Replace or extract a model's VAE.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def bake(
    model: Annotated[str, Argument(help="The model: file, folder or name.", show_default=False)],
    vae: Annotated[str, Argument(help="A VAE file, or any model that has a VAE.", show_default=False)],
    target: Annotated[Path, Argument(metavar="OUT", help="The file to write.", readable=False, show_default=False)],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replace a model's VAE with another one."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.workshop.vae import bake as service

    settings = read()
    with bytes_bar() as bar:
        done = service(resolve(model, settings), resolve(vae, settings), target, overwrite=overwrite, on_work=bar.show)
    print(
        json_line({"path": str(target), **asdict(done)})
        if as_json
        else f"{shown(target)}: {plural(done.tensors, 'tensor')}, {done.nbytes / 1e6:,.1f} MB"
    )


@app.command()
def extract(
    model: Annotated[str, Argument(help="The model: file, folder or name.", show_default=False)],
    target: Annotated[Path, Argument(metavar="OUT", help="The file to write.", readable=False, show_default=False)],
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="unchanged")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Extract a model's VAE to a file."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.workshop.convert import convert as service

    with bytes_bar() as bar:
        done = service(resolve(model, read()), target, only="vae", dtype=dtype, overwrite=overwrite, on_work=bar.show)
    print(
        json_line({"path": str(target), **asdict(done)})
        if as_json
        else f"{shown(target)}: {plural(done.tensors, 'tensor')}, {done.nbytes / 1e6:,.1f} MB"
    )
