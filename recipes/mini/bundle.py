"""Make a model file of what the stages have learnt: python -m recipes.mini.bundle OUT.safetensors [--folder runs/mini]

A Stable Diffusion 1 checkpoint in the original names, float16, with its card's facts in the header. The averages are
taken where they were trained; the text tower's projection and the image tower stay behind, as in every SD1 file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.files.write import write_safetensors
from recipes.mini import train
from recipes.mini.command import ended, tell_written
from recipes.mini.kept import PREFIXES, averaged, part_of


def bundle(folder: Path, out: Path, rest: ModelFile | None = None) -> str:
    """Write the newest checkpoints of all stages in `folder` as one file; returns its sha256.

    Stages that never ran there are taken from the model file `rest`.
    """
    tensors: dict[str, Tensor] = {}
    for network in ("unet", "vae", "text"):
        prefix = PREFIXES[network]
        stage = folder / network
        weights = averaged(stage, network)
        if weights is None:
            weights = train.trained(stage, network) if rest is None else part_of(rest, network)
        tensors |= {prefix + name: value for name, value in weights.items() if name != "text_projection.weight"}
    return write_safetensors(out, halved(lifted(tensors)), describe())


def lifted(tensors: Mapping[str, Tensor], by: float = 0.1) -> dict[str, Tensor]:
    """The same model with `by` added to every number of the context, which changes no picture.

    A1111's weights divide by the context's mean, as CLIP's is about -0.1; a small encoder's is nearly 0, and any weight
    could turn its sign. Added to all tokens alike, `by` falls out of the attention's softmax, and what it adds to the
    values is taken off the bias behind them.
    """
    changed = dict(tensors)
    bias = PREFIXES["text"] + "text_model.final_layer_norm.bias"
    changed[bias] = tensors[bias] + by
    for name, out in tensors.items():
        if name.endswith(".attn2.to_out.0.weight"):
            value = tensors[name.replace("to_out.0", "to_v")]
            below = name.replace("weight", "bias")
            changed[below] = tensors[below] - out @ (value.sum(1) * by)
    return changed


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float16, contiguous."""
    return {name: value.to(torch.float16).contiguous() for name, value in tensors.items()}


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
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--rest", type=Path, help="a bundled model file to take stages from that did not run")
    options = parser.parse_args(arguments)

    def make() -> None:
        rest = open_model(options.rest) if options.rest is not None else None
        tell_written(options.out, bundle(options.folder, options.out, rest))

    return ended(make)


if __name__ == "__main__":
    sys.exit(main())
