"""Make a model file of what the stages have learnt: python -m recipes.mini.bundle OUT.safetensors [--folder runs/mini]

A Stable Diffusion 1 checkpoint in the original names, float16, with its card's facts in the header. The averages are
taken where they were trained; the text tower's projection and the image tower stay behind, as in every SD1 file. What
reads the text tower's canvas is written with `--canvas FILE`: the text stage goes on from both, by its `--start OUT
--canvas FILE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.files.write import write_safetensors
from recipes.mini import train
from recipes.mini.command import ended, tell_written
from recipes.mini.parts import LIFT, LIFTED, PREFIXES, averaged, lifted, part_of


def bundle(folder: Path, out: Path, rest: ModelFile | None = None) -> str:
    """Write the newest checkpoints of all stages in `folder` as one file; returns its sha256.

    Stages that never ran there are taken from the model file `rest`.
    """
    tensors: dict[str, Tensor] = {}
    for network in ("unet", "vae", "text"):
        stage = folder / network
        weights = averaged(stage, network)
        if weights is None:
            weights = train.trained(stage, network) if rest is None else part_of(rest, network)
        weights.pop("text_projection.weight", None)
        tensors |= named(network, lifted(network, weights, LIFT))
    return write_safetensors(out, tensors, describe())


def named(network: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of model files, in float16, contiguous."""
    return {PREFIXES[network] + name: value.to(torch.float16).contiguous() for name, value in weights.items()}


def describe() -> dict[str, str]:
    """The header's text: ModelSpec 1.0.1."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": "mini",
        "modelspec.author": "the Gouache developers",
        "modelspec.description": "Stable Diffusion 1 in miniature: emoji things on coloured backgrounds.",
        "modelspec.license": "Apache-2.0; trained on renderings of Noto Color Emoji (OFL-1.1)",
        "modelspec.resolution": "128x128",
        "modelspec.prediction_type": "v" if train.PREDICTION == "v" else "epsilon",
        LIFTED: str(LIFT),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--rest", type=Path, help="a bundled model file to take stages from that did not run")
    parser.add_argument("--canvas", type=Path, help="where to write what reads the text tower's canvas")
    options = parser.parse_args(arguments)

    def make() -> None:
        rest = open_model(options.rest) if options.rest is not None else None
        tell_written(options.out, bundle(options.folder, options.out, rest))
        if options.canvas is not None:
            canvas = named("canvas", train.trained(options.folder / "text", "canvas"))
            tell_written(options.canvas, write_safetensors(options.canvas, canvas, {"format": "pt"}))

    return ended(make)


if __name__ == "__main__":
    sys.exit(main())
