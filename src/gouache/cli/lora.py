"""`gouache lora extract|bake|resize|merge|rename`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

from gouache.cli.text import shown
from gouache.outside import json_line
from gouache.wording import plural

if TYPE_CHECKING:
    from gouache.workshop.lora.write import Made

app = Typer(help="Extract, change and bake LoRAs.", no_args_is_help=True, rich_markup_mode=None)

Overwrite = Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Dtype = Annotated[str, Option(help="fp32, bf16 or fp16.")]
Energy = Annotated[
    float | None, Option(help="Keep only as many directions as hold this share of the squared difference (0 to 1).")
]
Ratio = Annotated[float | None, Option(help="Drop directions more than RATIO times weaker than the strongest.")]
Out = Annotated[
    Path, Argument(metavar="OUT", help="The .safetensors file to write.", readable=False, show_default=False)
]


@app.command()
def extract(
    tuned: Annotated[str, Argument(help="The fine-tuned model.", show_default=False)],
    base: Annotated[str, Argument(help="The model it was fine-tuned from.", show_default=False)],
    target: Out,
    rank: Annotated[int, Option(help="Maximum rank of each module.")] = 64,
    conv_rank: Annotated[int, Option(help="Maximum rank of 3x3 convolutions; 0 skips them.")] = 0,
    energy: Energy = None,
    ratio: Ratio = None,
    text: Annotated[bool, Option("--text/--no-text", help="Include the text encoders.")] = True,
    dtype: Dtype = "fp16",
    naming: Annotated[str, Option(help="Naming of the modules: kohya or peft.")] = "kohya",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the difference of the models TUNED and BASE as a LoRA."""
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
    _print(done, target, as_json)


@app.command()
def bake(
    model: Annotated[str, Argument(help="The model.", show_default=False)],
    loras: Annotated[
        list[str], Argument(metavar="LORA[:STRENGTH]... OUT", help="LoRAs, then the file to write.", show_default=False)
    ],
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="the model's dtype")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add LoRAs to a model's weights permanently."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.cli.strengths import strengths
    from gouache.errors import RequestError
    from gouache.workshop.lora.bake import bake as service

    if len(loras) < 2:
        raise RequestError("loras", "name at least one LoRA, then the file to write")
    settings, target = read(), Path(loras[-1])
    with bytes_bar() as bar:
        counts = service(
            resolve(model, settings), strengths(loras[:-1], settings), target, dtype=dtype, overwrite=overwrite,
            on_work=bar.show,
        )  # fmt: skip
    if as_json:
        print(
            json_line(
                {"path": str(target), "loras": {k: {"modules": m, "unmatched": u} for k, (m, u) in counts.items()}}
            )
        )
        return
    print(shown(target))
    for path, (modules, unmatched) in counts.items():
        names = f", {plural(unmatched, 'name')} without a matching module" if unmatched else ""
        print(f"  {shown(path)}: {plural(modules, 'module')} changed{names}")


@app.command()
def resize(
    source: Annotated[str, Argument(metavar="IN", help="The LoRA.", show_default=False)],
    target: Out,
    rank: Annotated[int, Option(help="Maximum rank of each module.")] = 16,
    conv_rank: Annotated[
        int | None, Option(help="Maximum rank of 3x3 convolutions; 0 skips them.", show_default="same as --rank")
    ] = None,
    energy: Energy = None,
    ratio: Ratio = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Reduce the ranks of a LoRA."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.workshop.lora.change import resize as service
    from gouache.workshop.lora.factors import Size

    size = Size(rank, rank if conv_rank is None else conv_rank, energy, ratio)
    with Bar() as bar:
        done = service(resolve(source, read()), target, size, dtype=dtype, overwrite=overwrite, on_work=bar.show)
    _print(done, target, as_json)


@app.command()
def merge(
    loras: Annotated[
        list[str], Argument(metavar="LORA[:STRENGTH]... OUT", help="LoRAs, then the file to write.", show_default=False)
    ],
    rank: Annotated[
        int | None, Option(help="Merge by SVD, with this maximum rank.", show_default="concatenate")
    ] = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge several LoRAs into one: exactly, by concatenation, or to a maximum rank, by SVD."""
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.cli.strengths import strengths
    from gouache.errors import RequestError
    from gouache.workshop.lora.change import merge as service
    from gouache.workshop.lora.factors import Size

    if len(loras) < 3:
        raise RequestError("loras", "name at least two LoRAs, then the file to write")
    size = Size(rank, rank) if rank is not None else None
    with Bar() as bar:
        done = service(
            strengths(loras[:-1], read()), Path(loras[-1]), size, dtype=dtype, overwrite=overwrite, on_work=bar.show
        )
    _print(done, Path(loras[-1]), as_json)


@app.command()
def rename(
    source: Annotated[str, Argument(metavar="IN", help="The LoRA.", show_default=False)],
    target: Out,
    to: Annotated[str, Option(help="Naming of the modules: kohya or peft.")] = "kohya",
    family: Annotated[
        str | None, Option(help="Model family: sd1, sd2 or sdxl.", show_default="detected from the file")
    ] = None,
    dtype: Dtype = "fp16",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Rename a LoRA's modules to kohya's naming, or to that of PEFT and diffusers."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.workshop.lora.change import rename as service

    done = service(resolve(source, read()), target, to, family, dtype=dtype, overwrite=overwrite)
    _print(done, target, as_json)


def _print(done: Made, target: Path, as_json: bool) -> None:
    if as_json:
        print(json_line({"path": str(target), **asdict(done)}))
        return
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    modules = plural(done.modules, "module")
    print(f"{shown(target)}: {modules}, {ranks}, {done.nbytes / 1e6:,.1f} MB; {done.held:.1%} of the difference")
    if left_out := _left_out(done.left_out):
        print(left_out)


def _left_out(counts: Mapping[str, int]) -> str:
    """One line on the weights that are not in the LoRA; "" where there is nothing to report."""
    from gouache.workshop.lora.write import CONVOLUTIONS, UNCHANGED, UNPAIRED

    parts = []
    if number := counts.get(CONVOLUTIONS):
        parts.append(f"skipped {plural(number, '3x3 convolution')} (use --conv-rank to include them)")
    if number := counts.get(UNPAIRED):
        parts.append(f"skipped {plural(number, 'weight')} that BASE does not have in the same shape")
    if UNCHANGED in counts and (parts or counts[UNCHANGED]):
        parts.append(f"{plural(counts[UNCHANGED], 'weight')} unchanged")
    return "; ".join(parts)
