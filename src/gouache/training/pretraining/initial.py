"""The random weights that pretraining starts from, tensor by tensor: a function of name, shape and seed alone.

Initialised as the original networks are. Layers have PyTorch's uniform distribution, norms are the identity; the last
layer of each residual branch of the U-Net and its output are zero, so that it predicts 0 at first (Ho et al. 2020);
CLIP's matrices have the deviations of Radford et al. 2021, published with its code.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gouache.layouts.original import text_shapes, unet_shapes, vae_shapes
from gouache.layouts.rules import Shape
from gouache.training.pretraining.presets import Preset

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
"""Of the parts in original files of Stable Diffusion 1."""
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"  # a buffer of Transformers, in all files

_ZERO = re.compile(r"(input_blocks|middle_block|output_blocks)\..*(out_layers\.3|proj_out)\.|out\.2\.")
_CLIP_LAYERS = re.compile(r"encoder\.layers\.(\d+)\.")


def file_shapes(preset: Preset) -> dict[str, Shape]:
    """All weights of the model under their names in an original file."""
    shapes = {"unet": unet_shapes(preset.unet), "vae": vae_shapes(preset.vae), "text": text_shapes(preset.text)}
    return {PREFIXES[part] + name: shape for part, found in shapes.items() for name, shape in found.items()}


def tensor_of_file(name: str, shapes: Mapping[str, Shape], seed: int) -> Tensor:
    """The initial value of one of `file_shapes`, float32."""
    part = next(part for part, prefix in PREFIXES.items() if name.startswith(prefix))
    prefix = PREFIXES[part]
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return initial_tensor(part, name.removeprefix(prefix), own, seed)


@torch.no_grad()
def initialise(network: nn.Module, part: str, seed: int) -> None:
    """Set all weights of `network`. `part`: unet, vae, text, vision; or another name for one of ordinary layers."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for name, parameter in network.named_parameters():
        parameter.copy_(initial_tensor(part, name, shapes, seed))


def initial_tensor(part: str, name: str, shapes: Mapping[str, Shape], seed: int) -> Tensor:
    """The value of `name`, float32, in a network whose weights have `shapes`."""
    shape = shapes[name]
    module, _, kind = name.rpartition(".")
    weight = shapes.get(f"{module}.weight", shape)
    if kind in ("weight", "bias") and len(weight) == 1:  # of a norm
        return torch.ones(shape) if kind == "weight" else torch.zeros(shape)
    if part == "unet" and _ZERO.match(name):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(_seed(seed, part, name))
    if part in ("text", "vision"):
        if kind == "bias":
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) * _deviation_of_clip(part, name, shapes)
    bound = 1 / math.sqrt(math.prod(weight[1:]))
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _deviation_of_clip(part: str, name: str, shapes: Mapping[str, Shape]) -> float:
    """The standard deviation of a matrix of CLIP; its towers are alike apart from their inputs."""
    layers = 1 + max((int(match[1]) for match in map(_CLIP_LAYERS.search, shapes) if match), default=0)
    width = next(shape[0] for key, shape in shapes.items() if key.endswith("layers.0.layer_norm1.weight"))
    out = width**-0.5 * (2 * layers) ** -0.5
    if name.endswith("token_embedding.weight"):
        return 0.02
    if name.endswith("position_embedding.weight") and part == "text":
        return 0.01
    if name.endswith("patch_embedding.weight"):
        return math.prod(shapes[name][1:]) ** -0.5
    if name.endswith(("out_proj.weight", "fc2.weight")):
        return out
    if name.endswith("fc1.weight"):
        return (2 * width) ** -0.5
    return width**-0.5


def _seed(seed: int, part: str, name: str) -> int:
    return int(hashlib.sha256(f"initial {seed} {part} {name}".encode()).hexdigest()[:15], 16)
