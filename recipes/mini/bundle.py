"""Write the trained stages as one model file: python -m recipes.mini.bundle OUT.safetensors [--folder runs/mini]

The file is a Stable Diffusion 1 checkpoint with the original names, in float16, with ModelSpec metadata in its header.
Averaged weights are used where training kept them. The text encoder's projection and the image encoder are left out, as
in every SD1 file. `--layout FILE` also writes the head that decodes the text encoder's layout tokens; the text stage
can be continued from both files with `--start OUT --layout FILE`.
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
from gouache.model.model import CFG_KEY
from recipes.mini import train
from recipes.mini.command import print_written, run_command
from recipes.mini.weights import (
    CONTEXT_SHIFT,
    CONTEXT_SHIFT_KEY,
    PREFIXES,
    network_weights,
    newest_weights,
    shift_context,
)


def bundle(folder: Path, out: Path, rest: ModelFile | None = None) -> str:
    """Write the newest checkpoints of all stages in `folder` as one file; returns its sha256.

    Stages that have no checkpoint there are copied from the model file `rest`.
    """
    tensors: dict[str, Tensor] = {}
    for network in ("unet", "vae", "text"):
        stage = folder / network
        weights = newest_weights(stage, network)
        if weights is None:
            weights = train.trained_weights(stage, network) if rest is None else network_weights(rest, network)
        weights.pop("text_projection.weight", None)
        tensors |= file_tensors(network, shift_context(network, weights, CONTEXT_SHIFT))
    return write_safetensors(out, tensors, metadata())


def file_tensors(network: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of model files, in float16, contiguous."""
    return {PREFIXES[network] + name: value.to(torch.float16).contiguous() for name, value in weights.items()}


def metadata() -> dict[str, str]:
    """The header's metadata: ModelSpec 1.0.1."""
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
        CONTEXT_SHIFT_KEY: str(CONTEXT_SHIFT),
        CFG_KEY: "4",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--rest", type=Path, help="a bundled model file to copy stages from that have no checkpoint")
    parser.add_argument("--layout", type=Path, help="also write the layout head to this file")
    options = parser.parse_args(arguments)

    def write() -> None:
        rest = open_model(options.rest) if options.rest is not None else None
        print_written(options.out, bundle(options.folder, options.out, rest))
        if options.layout is not None:
            layout = file_tensors("layout", train.trained_weights(options.folder / "text", "layout"))
            print_written(options.layout, write_safetensors(options.layout, layout, {"format": "pt"}))

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
