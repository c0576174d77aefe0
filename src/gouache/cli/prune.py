"""`gouache prune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.cli.text import shown
from gouache.outside import json_line
from gouache.wording import plural


def prune(
    source: Annotated[str, Argument(metavar="IN", help="A checkpoint: file, folder or name.", show_default=False)],
    target: Annotated[
        Path,
        Argument(metavar="OUT", help="The .safetensors or .ckpt file to write.", readable=False, show_default=False),
    ],
    keep: Annotated[
        str | None,
        Option(
            help="Weights to keep: ema (EMA weights), last (trained weights) or both.",
            show_default="ema if the file has EMA weights, else last",
        ),
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Cast weights to fp32, bf16, fp16 or fp8_e4m3.", show_default="unchanged")
    ] = None,
    drop: Annotated[
        list[str] | None, Option(help="Component to drop, vae or text; can be repeated.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shrink a checkpoint to what inference needs. Drops the optimizer, losses, and either EMA or trained weights."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.errors import printable
    from gouache.workshop.prune import prune as service

    path = resolve(source, read())
    with bytes_bar() as bar:
        done = service(
            path, target, keep=keep, dtype=dtype, drop=tuple(drop or ()), overwrite=overwrite, on_work=bar.show
        )
    if as_json:
        print(json_line({"path": str(target), **asdict(done), "saved": done.saved}))
        return
    print(f"{shown(target)}: {plural(done.tensors, 'tensor')}, {done.nbytes / 1e6:,.1f} MB; kept {done.kept}")
    for note in done.notes:
        print(f"note: {printable(note, 400)}")
    for reason, (count, nbytes) in done.dropped.items():
        print(f"dropped  {plural(count, 'tensor')}, {nbytes / 1e6:,.1f} MB: {reason}")
    if done.cast_saved:
        print(f"cast to {dtype}  {_change(done.cast_saved)}")
    print(f"in all, {_change(done.saved)} than the source")


def _change(saved: int) -> str:
    return f"{abs(saved) / 1e6:,.1f} MB {'larger' if saved < 0 else 'smaller'}"
