"""`gouache`: the commands, and how every one of them ends.

Bad input prints one line and ends with 2; Ctrl-C ends with 130 and loses nothing that was finished.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from gouache.cli import (
    compare,
    convert,
    doctor,
    embedding,
    files,
    inspect,
    lora,
    merge,
    models,
    paint,
    prune,
    repaint,
    samplers,
    scan,
    vae,
)
from gouache.errors import GouacheError
from gouache.version import __version__

app = typer.Typer(
    name="gouache",
    help="Stable Diffusion: paint, inspect and convert models, on any machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    paint.paint, repaint.repaint, inspect.inspect, scan.scan, convert.convert, prune.prune, merge.merge, files.metadata,
    files.diff, compare.compare, samplers.samplers, doctor.doctor,
):  # fmt: skip
    app.command()(command)
app.command("hash")(files.hash_)
for group, name in ((vae.app, "vae"), (lora.app, "lora"), (embedding.app, "embedding"), (models.app, "models")):
    app.add_typer(group, name=name)


def _version(asked: bool) -> None:
    if asked:
        print(f"gouache {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Stable Diffusion: paint, inspect and convert models, on any machine."""


def main() -> None:
    """The console script."""
    try:
        app(prog_name="gouache")
    except GouacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
