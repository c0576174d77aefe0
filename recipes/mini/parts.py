"""One network's weights out of a run's folder or out of a bundled model file, and what sets the two apart.

In a bundled file the context is lifted: `LIFT` is added to every number of it, which changes no picture. A1111's
weights divide by the context's mean, as CLIP's is about -0.1; a small encoder's is nearly 0, and any weight could turn
its sign. Added to all tokens alike, the lift falls out of the attention's softmax, and what it adds to the values is
taken off the bias behind them. The header says that it was done, and `part_of` takes it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gouache.files.record import ModelFile
from gouache.training import state

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
    "canvas": "canvas.",
}
LIFT = 0.1
LIFTED = "gouache.context_lift"  # in the header


def averaged(folder: Path, network: str) -> dict[str, Tensor] | None:
    """The weights of `network` in the newest checkpoint of a stage, averages where they were trained."""
    found = state.newest(folder)
    if found is None:
        return None
    weights = {**found.tensors["weights"], **found.tensors.get("ema", {})}
    return {
        name.removeprefix(f"{network}."): value for name, value in weights.items() if name.startswith(f"{network}.")
    }


def part_of(file: ModelFile, network: str) -> dict[str, Tensor]:
    """One network's weights in float32, out of a bundled file or any in the original names."""
    prefix = PREFIXES[network]
    found = {name.removeprefix(prefix): file.tensor(name).float() for name in file if name.startswith(prefix)}
    return lifted(network, found, -float(file.metadata[LIFTED])) if LIFTED in file.metadata else found


def lifted(network: str, weights: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """The same network for a context that has `by` added to every number: to be done to "text" and "unet" together."""
    changed = dict(weights)
    if network == "text":
        changed["text_model.final_layer_norm.bias"] = weights["text_model.final_layer_norm.bias"] + by
    elif network == "unet":
        for name, out in weights.items():
            if name.endswith(".attn2.to_out.0.weight"):
                value = weights[name.replace("to_out.0", "to_v")]
                below = name.replace("weight", "bias")
                changed[below] = weights[below] - out @ (value.sum(1) * by)
    return changed
