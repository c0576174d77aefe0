"""Make the model file of a training: python -m recipes.mini.bundle OUT.safetensors [--folder runs/mini]

It is the result of the last stage that has one, as a Stable Diffusion 1 checkpoint with the original names, in float16,
with ModelSpec metadata in its header. `--layout FILE` also writes the head that decodes the text encoder's layout
tokens; training can go on from both with `--start OUT --layout FILE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from gouache.app.training import stages
from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.files.write import write_safetensors
from gouache.model.model import CFG_KEY
from recipes.mini.command import print_written, run_command
from recipes.mini.stages import layout_head
from recipes.mini.weights import CONTEXT_SHIFT, CONTEXT_SHIFT_KEY, PREFIXES, network_weights, shift_context


def bundle(folder: Path, out: Path) -> str:
    """Write the newest result in `folder` as a model file; returns its sha256. Raises RequestError without one."""
    results = [each.result for each in stages.read(folder)[1] if each.result.is_file()]
    if not results:
        raise RequestError("folder", f"{folder} has no result of a stage yet")
    file = open_model(results[-1])
    tensors: dict[str, Tensor] = {}
    for network in ("unet", "vae", "text"):
        tensors |= file_tensors(network, shift_context(network, network_weights(file, network), CONTEXT_SHIFT))
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
        "modelspec.prediction_type": "v",
        CONTEXT_SHIFT_KEY: str(CONTEXT_SHIFT),
        CFG_KEY: "4",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"))
    parser.add_argument("--layout", type=Path, help="also write the layout head to this file")
    options = parser.parse_args(arguments)

    def write() -> None:
        print_written(options.out, bundle(options.folder, options.out))
        if options.layout is not None:
            text = next(each for each in stages.read(options.folder)[1] if each.name == "text")
            tensors = file_tensors("layout", layout_head(text.folder))
            print_written(options.layout, write_safetensors(options.layout, tensors, {"format": "pt"}))

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
