"""`gouache convert`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def convert(
    source: Annotated[
        str, Argument(metavar="IN", help="Any file, folder or model name that can be read.", show_default=False)
    ],
    target: Annotated[
        Path, Argument(metavar="OUT", help="A .safetensors or .ckpt file, or a folder to make.", show_default=False)
    ],
    to: Annotated[
        str | None, Option(help="safetensors, ckpt or diffusers.", show_default="what OUT is named like")
    ] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16, fp16 or fp8_e4m3.", show_default="as they are")] = None,
    only: Annotated[str | None, Option(help="One component alone: unet, vae or text.", show_default="all")] = None,
    metadata: Annotated[
        list[str] | None, Option(help="KEY=VALUE for the header; may be given several times.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert any model between .safetensors, .ckpt and diffusers folders, without running code from it."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.pairs import pairs
    from gouache.cli.progress import bytes_bar
    from gouache.workshop.convert import convert as service

    texts = pairs("metadata", metadata or [])
    with bytes_bar() as bar:
        done = service(
            resolve(source, read()), target, to=to, dtype=dtype, only=only, metadata=texts, overwrite=overwrite,
            on_work=bar.show,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"path": str(target), **asdict(done)}))
        return
    print(f"{target}: {done.tensors} tensors, {done.nbytes / 1e6:,.1f} MB, read back and found equal to the source")
    for reason, count in done.kept_beside.items():
        print(f"kept in its leftovers.safetensors  {count} tensors: {reason}")
    for reason, count in done.left_out.items():
        print(f"left out  {count} {reason}")
