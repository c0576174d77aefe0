"""`gouache lora extract|bake|resize|merge|rename`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

if TYPE_CHECKING:
    from gouache.workshop.lora.write import Made

app = Typer(help="Make, change and bake LoRAs.", no_args_is_help=True, rich_markup_mode=None)

Overwrite = Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Dtype = Annotated[str, Option(help="fp32, bf16 or fp16.")]
Energy = Annotated[float | None, Option(help="Keep as few directions as hold this share of the squared difference.")]
Ratio = Annotated[float | None, Option(help="Keep directions at least this many times weaker than the strongest.")]
Out = Annotated[Path, Argument(metavar="OUT", help="The .safetensors file to write.", show_default=False)]


@app.command()
def extract(
    tuned: Annotated[str, Argument(help="The tuned model.", show_default=False)],
    base: Annotated[str, Argument(help="What it was tuned from.", show_default=False)],
    target: Out,
    rank: Annotated[int, Option(help="The most directions of a module.")] = 64,
    conv_rank: Annotated[int, Option(help="The same for convolutions of 3x3; 0 leaves them out.")] = 0,
    energy: Energy = None,
    ratio: Ratio = None,
    text: Annotated[bool, Option("--text/--no-text", help="Whether text encoders are taken too.")] = True,
    dtype: Dtype = "fp16",
    naming: Annotated[str, Option(help="Whose names: kohya or peft.")] = "kohya",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write what TUNED has over BASE as a LoRA."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.workshop.lora.extract import extract as service
    from gouache.workshop.lora.factors import Size

    size, settings = Size(rank, conv_rank, energy, ratio), read()
    with Bar() as bar:
        done = service(
            resolve(tuned, settings), resolve(base, settings), target, size, dtype=dtype, naming=naming, text=text,
            overwrite=overwrite, on_work=bar.show,
        )  # fmt: skip
    _tell(done, target, as_json)


@app.command()
def bake(
    model: Annotated[str, Argument(help="The model.", show_default=False)],
    loras: Annotated[
        list[str], Argument(metavar="LORA[:STRENGTH]... OUT", help="LoRAs, then the file to write.", show_default=False)
    ],
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="that of the model")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add LoRAs to a model's weights for good."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.cli.strengths import strengths
    from gouache.errors import RequestError
    from gouache.workshop.lora.bake import bake as service

    if len(loras) < 2:
        raise RequestError("loras", "name the LoRAs, and then the file to write")
    settings, target = read(), Path(loras[-1])
    with bytes_bar() as bar:
        counts = service(
            resolve(model, settings), strengths(loras[:-1], settings), target, dtype=dtype, overwrite=overwrite,
            on_work=bar.show,
        )  # fmt: skip
    if as_json:
        print(
            json.dumps(
                {"path": str(target), "loras": {k: {"modules": m, "unmatched": u} for k, (m, u) in counts.items()}}
            )
        )
        return
    print(target)
    for path, (modules, unmatched) in counts.items():
        print(f"  {path}: {modules} modules changed, {unmatched} names without a module")


@app.command()
def resize(
    source: Annotated[str, Argument(metavar="IN", help="The LoRA.", show_default=False)],
    target: Out,
    rank: Annotated[int, Option(help="The most directions of a module.")] = 16,
    conv_rank: Annotated[
        int | None, Option(help="The same for convolutions of 3x3; 0 leaves them out.", show_default="as --rank")
    ] = None,
    energy: Energy = None,
    ratio: Ratio = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA with other ranks."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.workshop.lora.change import resize as service
    from gouache.workshop.lora.factors import Size

    size = Size(rank, rank if conv_rank is None else conv_rank, energy, ratio)
    with Bar() as bar:
        done = service(resolve(source, read()), target, size, dtype=dtype, overwrite=overwrite, on_work=bar.show)
    _tell(done, target, as_json)


@app.command()
def merge(
    loras: Annotated[
        list[str], Argument(metavar="LORA[:STRENGTH]... OUT", help="LoRAs, then the file to write.", show_default=False)
    ],
    rank: Annotated[int | None, Option(help="Merge by SVD, to this rank.", show_default="by concatenation")] = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make one LoRA of several: by concatenation, which is exact, or to a rank by SVD."""
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.cli.strengths import strengths
    from gouache.errors import RequestError
    from gouache.workshop.lora.change import merge as service
    from gouache.workshop.lora.factors import Size

    if len(loras) < 3:
        raise RequestError("loras", "name at least two LoRAs, and then the file to write")
    size = Size(rank, rank) if rank is not None else None
    with Bar() as bar:
        done = service(
            strengths(loras[:-1], read()), Path(loras[-1]), size, dtype=dtype, overwrite=overwrite, on_work=bar.show
        )
    _tell(done, Path(loras[-1]), as_json)


@app.command()
def rename(
    source: Annotated[str, Argument(metavar="IN", help="The LoRA.", show_default=False)],
    target: Out,
    to: Annotated[str, Option(help="Whose names: kohya or peft.")] = "kohya",
    family: Annotated[str | None, Option(help="sd1, sd2, sdxl, where the file does not tell.")] = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA under the names of kohya's tools, or of PEFT and diffusers."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.workshop.lora.change import rename as service

    done = service(resolve(source, read()), target, to, family, dtype=dtype, overwrite=overwrite)
    _tell(done, target, as_json)


def _tell(done: Made, target: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(target), **asdict(done)}))
        return
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    print(f"{target}: {done.modules} modules, {ranks}, {done.nbytes / 1e6:,.1f} MB; {done.held:.1%} of the difference")
    for reason, count in done.left_out.items():
        print(f"left out {count} weights: {reason}")
