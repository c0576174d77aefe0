"""Train the embedded model: python -m recipes.mini.train [--folder runs/mini] [--start FILE] [--seconds N]

Three stages, autoencoder, text encoder and U-Net (`stages.toml`), as `gouache train run` trains stages: they can be
interrupted at any moment, by Ctrl-C or a kill, and the same command goes on; `gouache train status FOLDER` shows them.
`recipes.mini.bundle` makes the model file of the result. With `--start FILE` training goes on from a bundled file, for
the embedded model `--start src/gouache/embedded/mini.safetensors`; otherwise from nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from gouache.app.settings import read
from gouache.app.training import folder as run_folder
from gouache.app.training import stages as training
from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.files.write import write_atomic, write_safetensors
from gouache.training.pretraining import initial
from recipes.mini.batches import SceneData
from recipes.mini.command import print_progress, run_command
from recipes.mini.rendering import Glyphs
from recipes.mini.stages import SIZES, preparations
from recipes.mini.weights import PREFIXES, network_weights

STAGES = Path(__file__).with_name("stages.toml")
LAYOUT = Path(__file__).with_name("layout_head.safetensors")  # of the embedded model's text encoder
SEED = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--start", type=Path, help="a bundled file to begin from")
    parser.add_argument("--layout", type=Path, default=LAYOUT, help="the layout head of its text encoder")
    parser.add_argument("--stages", type=Path, default=STAGES, help="the file of the stages")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in a usual font folder")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_command(lambda: train(options))


def train(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    head = None if options.start is None else network_weights(open_model(options.layout), "layout")
    if not (folder / run_folder.STAGES).exists():
        start = initial_weights() if options.start is None else start_weights(options.start)
        begin(folder, options.stages, start)
    data = SceneData(glyphs=Glyphs(options.font))
    finished = training.run(
        folder, read(), on_note=print_note, on_progress=print_progress, seconds=options.seconds, overwrite=True,
        on_stage=lambda name, number, count: print_note(f"stage {name}, {number} of {count}"),
        preparations=preparations(data, head),
    )  # fmt: skip
    print(f"step {finished.step}: {finished.path or 'stopped; run again to continue'}")


def begin(folder: Path, stages: Path, start: dict[str, Tensor]) -> None:
    """Write the model that the first stage starts from, and the file of the stages."""
    folder.mkdir(parents=True, exist_ok=True)
    model, output = (folder.absolute() / f"{name}.safetensors" for name in ("start", "trained"))
    resolution = f"{SIZES.resolution}x{SIZES.resolution}"
    write_safetensors(model, start, {"modelspec.resolution": resolution, "modelspec.title": "start"})
    text = f"output = {str(output)!r}\n{stages.read_text()}\n"
    text = text.replace("[samples]", f"[model]\nname = {str(model)!r}\n\n[samples]", 1)
    write_atomic(folder / run_folder.STAGES, text.encode())


def initial_weights() -> dict[str, Tensor]:
    """Random weights of the sizes of `mini`; each stage replaces those of its part by chosen ones."""
    shapes = initial.file_shapes(SIZES)
    return {name: initial.tensor_of_file(name, shapes, SEED) for name in shapes}


def start_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a bundled file in float32, without the shift of its context. Raises RequestError."""
    file, shapes = open_model(path), initial.file_shapes(SIZES)
    found = {
        PREFIXES[part] + name: tensor.contiguous()
        for part in ("vae", "text", "unet")
        for name, tensor in network_weights(file, part).items()
    }
    for name in [*found, *shapes]:
        there, here = (tuple(found[name].shape) if name in found else None), shapes.get(name)
        if there != here and name != initial.POSITIONS:
            raise RequestError(
                "start",
                f"the file does not fit this recipe: {name} is {there or 'missing'} there, {here or 'unknown'} here;"
                " use a file that this version of the recipe wrote",
            )
    return found


def print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
