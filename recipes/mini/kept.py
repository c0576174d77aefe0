"""Keep what an unfinished run has learnt: python -m recipes.mini.kept FOLDER OUT.safetensors

The averaged weights of the stages in FOLDER, a third as large as a model file, for `recipes.mini.train --start` to
begin from: of the token table only the vectors that some caption holds, of the autoencoder only the decoder, all in
float16, and the U-Net's matrices in eight bits, each row with a scale of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gouache.errors import RequestError
from gouache.files.record import ModelFile
from gouache.files.write import write_safetensors
from gouache.training import state
from recipes.mini.command import ended, tell_written

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
    "canvas": "canvas.",
}
STAGES = {"unet": "unet", "vae": "vae", "text": "text", "canvas": "text"}  # where each network is trained
TABLE = "text_model.embeddings.token_embedding.weight"
SCALE, ROWS = ".scale", ".rows"
TINY = 1e-30  # what a row of nothing is divided by
SMALL = 4096  # numbers: what has fewer stays in float16


def packed(network: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One network's weights as they are kept, with their names in model files."""
    kept: dict[str, Tensor] = {}
    for name, value in weights.items():
        key = PREFIXES[network] + name
        if network == "vae" and name.startswith(("encoder.", "quant_conv.")):
            continue  # where it starts is where it stays
        if network == "text" and name.startswith("text_projection."):
            continue
        if name == TABLE:
            rows = value.abs().sum(1).nonzero().flatten()
            kept[key], kept[key + ROWS] = value[rows].half(), rows.int()
        elif network == "unet" and value.ndim > 1 and value.numel() > SMALL:
            scale = value.abs().flatten(1).amax(1).float().clamp_min(TINY) / 127
            scale = scale.unflatten(0, (-1, *[1] * (value.ndim - 1)))
            kept[key], kept[key + SCALE] = (value / scale).round().to(torch.int8), scale
        else:
            kept[key] = value.half()
    return {name: value.contiguous() for name, value in kept.items()}


def part_of(file: ModelFile, network: str, vocabulary: int = 49408) -> dict[str, Tensor]:
    """One network's weights in float32, out of a kept file or a whole model file."""
    prefix, found = PREFIXES[network], {}
    for name in file:
        if not name.startswith(prefix) or name.endswith((SCALE, ROWS)):
            continue
        value = file.tensor(name).float()
        if name + SCALE in file:
            value = value * file.tensor(name + SCALE)
        if name + ROWS in file:
            whole = torch.zeros(vocabulary, value.shape[1])
            whole[file.tensor(name + ROWS).long()] = value
            value = whole
        found[name.removeprefix(prefix)] = value
    return found


def averaged(folder: Path, network: str) -> dict[str, Tensor] | None:
    """The weights of `network` in the newest checkpoint of a stage, averages where they were trained."""
    found = state.newest(folder)
    if found is None:
        return None
    weights = {**found.tensors["weights"], **found.tensors.get("ema", {})}
    return {
        name.removeprefix(f"{network}."): value for name, value in weights.items() if name.startswith(f"{network}.")
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)

    def keep() -> None:
        tensors: dict[str, Tensor] = {}
        for network, stage in STAGES.items():
            tensors |= packed(network, averaged(options.folder / stage, network) or {})
        if not tensors:
            raise RequestError("folder", f"{options.folder} holds no checkpoint of any stage")
        text = {"format": "pt", "note": "kept for recipes.mini.train"}
        tell_written(options.out, write_safetensors(options.out, tensors, text))

    return ended(keep)


if __name__ == "__main__":
    sys.exit(main())
