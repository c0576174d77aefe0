"""`gouache convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.cli.text import shown
from gouache.outside import json_line
from gouache.wording import plural


def convert(
    source: Annotated[
        str, Argument(metavar="IN", help="A model: any readable file, folder or name.", show_default=False)
    ],
    target: Annotated[
        Path,
        Argument(
            metavar="OUT",
            help="The .safetensors or .ckpt file, or folder, to write.",
            readable=False,
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        Option(help="Output format: safetensors, ckpt or diffusers.", show_default="from OUT's extension"),
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Cast weights to fp32, bf16, fp16 or fp8_e4m3.", show_default="unchanged")
    ] = None,
    only: Annotated[str | None, Option(help="Write one component: unet, vae or text.", show_default="all")] = None,
    metadata: Annotated[
        list[str] | None, Option(help="Metadata to add as KEY=VALUE; can be repeated.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert between .safetensors, .ckpt and diffusers folders. Code in the source is never run."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.pairs import pairs
    from gouache.cli.progress import bytes_bar
    from gouache.errors import printable
    from gouache.workshop.convert import convert as service

    texts = pairs("metadata", metadata or [])
    with bytes_bar() as bar:
        done = service(
            resolve(source, read()), target, to=to, dtype=dtype, only=only, metadata=texts, overwrite=overwrite,
            on_work=bar.show,
        )  # fmt: skip
    if as_json:
        print(json_line({"path": str(target), **asdict(done)}))
        return
    size = f"{plural(done.tensors, 'tensor')}, {done.nbytes / 1e6:,.1f} MB"
    print(f"{shown(target)}: {size}, verified: {_verified(done.rounded_to, dtype)}")
    for note in done.notes:
        print(f"note: {printable(note, 400)}")
    for reason, count in done.leftovers.items():
        print(f"saved in its leftovers.safetensors  {plural(count, 'tensor')}: {reason}")
    for reason, count in done.left_out.items():
        print(f"left out  {reason}: {count}")


def _verified(rounded_to: str | None, dtype: str | None) -> str:
    """What the comparison with the source has shown."""
    if rounded_to is None:
        return "equal to the source" if dtype is None else f"equal to the source, in {dtype}"
    vectors = " (vectors to fp16)" if rounded_to.startswith("fp8") else ""
    return f"equal to the source rounded to {rounded_to}{vectors}"
