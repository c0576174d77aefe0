"""`gouache convert`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def convert(
    source: Annotated[Path, Argument(metavar="IN", help="Any file or folder that can be read.", show_default=False)],
    target: Annotated[Path, Argument(metavar="OUT", help="The .safetensors file to write.", show_default=False)],
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16; otherwise as they are.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert any model file to .safetensors, in the original single-file names, without running code from it."""
    from gouache.workshop.convert import convert as service

    done = service(source, target, dtype=dtype, overwrite=overwrite)
    if as_json:
        print(json.dumps({"path": str(target), **asdict(done)}))
        return
    print(f"{target}: {done.tensors} tensors, {done.nbytes / 1e6:,.1f} MB, {done.layout}")
    for reason, count in done.left_out.items():
        print(f"left out {count} tensors: {reason}")
