"""`gouache prune`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def prune(
    source: Annotated[str, Argument(metavar="IN", help="A checkpoint: file, folder or name.", show_default=False)],
    target: Annotated[Path, Argument(metavar="OUT", help="The .safetensors or .ckpt file.", show_default=False)],
    keep: Annotated[str | None, Option(help="ema, last or both.", show_default="ema, where there are averages")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16, fp16 or fp8_e4m3.", show_default="as they are")] = None,
    drop: Annotated[
        list[str] | None, Option(help="vae or text; may be given several times.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Leave out what use does not need: optimizer, losses, averages or the weights they average, other dtypes."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.workshop.prune import prune as service

    path = resolve(source, read())
    with bytes_bar() as bar:
        done = service(
            path, target, keep=keep, dtype=dtype, drop=tuple(drop or ()), overwrite=overwrite, on_work=bar.show
        )
    if as_json:
        print(json.dumps({"path": str(target), **asdict(done), "saved": done.saved}))
        return
    print(f"{target}: {done.tensors} tensors, {done.nbytes / 1e6:,.1f} MB; kept {done.kept}")
    for reason, (count, nbytes) in done.dropped.items():
        print(f"dropped  {count} tensors, {nbytes / 1e6:,.1f} MB: {reason}")
    print(f"{done.saved / 1e6:,.1f} MB saved by that")
