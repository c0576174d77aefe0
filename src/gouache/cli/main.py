"""`gouache`: the commands, and how every one of them ends.

Bad input prints one line and ends with 2; Ctrl-C ends with 130 and loses nothing that was finished.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from gouache.app import threads
from gouache.cli import (
    compare,
    convert,
    dataset,
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
for group, name in (
    (dataset.app, "dataset"), (vae.app, "vae"), (lora.app, "lora"), (embedding.app, "embedding"), (models.app, "models"),
):  # fmt: skip
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
    _prepare_streams()
    sys.argv[1:] = map(_as_utf8, sys.argv[1:])
    threads.configure()  # before torch is loaded
    try:
        app(prog_name="gouache")
    except GouacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _discard_output()
        sys.exit(141)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print("error: not enough memory; choose a smaller size or batch, or dtype bf16", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EBADF):
            raise
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        _discard_output()
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _prepare_streams() -> None:
    """Output never fails for its encoding; a closed stream is one that nobody reads."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123  # to the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """What is still in the buffer would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_utf8(argument: str) -> str:
    """An argument whose bytes are UTF-8, also where the locale says another encoding."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


if __name__ == "__main__":
    main()
