"""`gouache`: the commands, and how every one of them ends.

Bad input prints one line and ends with 2. Ctrl-C (130) and SIGTERM (143) print "stopped", lose nothing that was
finished and leave no temporary files.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    train_results,
    vae,
)
from gouache.errors import GouacheError, is_out_of_memory
from gouache.outside import PrintableStream
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
    (train_results.app, "train"), (dataset.app, "dataset"), (vae.app, "vae"), (lora.app, "lora"),
    (embedding.app, "embedding"), (models.app, "models"),
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
    """Run the command line, and end the process with its exit code."""
    _prepare_streams()
    sys.argv[1:] = map(_as_utf8, sys.argv[1:])
    threads.configure()  # before torch is loaded
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # of Pillow: the picture is refused
    with _terminate_as_interrupt() as terminated:
        code = _run()
    sys.exit(_TERMINATED if terminated() and code == _INTERRUPTED else code)


_INTERRUPTED, _TERMINATED, _PIPE_CLOSED = 130, 143, 141  # as shells report SIGINT, SIGTERM and SIGPIPE
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of click, or of typer's copy of it


def _run() -> int:
    """The exit code of the command. What a user can cause ends in one line."""
    try:
        code = app(prog_name="gouache", standalone_mode=False)
        sys.stdout.flush()  # a full disk or a closed pipe is noticed here at the latest
    except SystemExit as exit:  # a command that chose its exit code
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except GouacheError as error:
        return _failed(str(error))
    except _UsageError as error:
        return _misused(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _discard_output()
        return _PIPE_CLOSED
    except OSError as error:
        if error.filename is not None:
            return _failed(f"{error.filename}: {error.strerror}")
        _discard_output()
        return _failed(f"the output cannot be written: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed("not enough memory; choose a smaller size or batch, or dtype bf16")
    if code == _INTERRUPTED:  # typer turns KeyboardInterrupt into this exit code
        print("stopped", file=sys.stderr)
        return _INTERRUPTED
    return code if isinstance(code, int) else 0


def _failed(message: str) -> int:
    with suppress(OSError):  # nobody reads the error stream, or it is full
        print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


def _misused(error: Exception) -> int:
    """A command line that cannot be understood: one line, or the help if there were no arguments."""
    context: typer.Context | None = getattr(error, "ctx", None)
    message: str = getattr(error, "format_message", error.__str__)()
    if context is None:
        return _failed(message)
    if message == context.get_help():
        print(message, file=sys.stderr)
        return 2
    return _failed(f"{message.rstrip('.')}; see `{context.command_path} --help`")


@contextmanager
def _terminate_as_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM ends a command as Ctrl-C does, so that temporary files are removed; yields whether it came.

    Only the first one: `timeout` and others send it to a process and to its group, and the second must not end the
    cleaning up.
    """
    came = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # somebody else handles it
        yield lambda: False
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepare_streams() -> None:
    """Output never fails for its encoding, and has no control characters; a closed stream is one that nobody reads."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  # to the end
        elif isinstance(stream, PrintableStream):
            continue
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, PrintableStream(stream))


def _discard_output() -> None:
    """What is still in the buffer would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_utf8(argument: str) -> str:
    """An argument whose bytes are UTF-8, also where the locale says another encoding."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


if __name__ == "__main__":
    main()
