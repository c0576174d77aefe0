"""One network's weights in a bundled model file, and how they differ from the trained ones.

In a bundled file the context is shifted: `CONTEXT_SHIFT` is added to every number of it, which changes no picture.
A1111's prompt weights divide by the context's mean, which is about -0.1 for CLIP; for this small encoder it is nearly
zero, so that any prompt weight could flip its sign. A shift of all tokens by the same amount cancels in the attention's
softmax, and its contribution to the values is subtracted from the bias of the output projection. The header records the
shift, and `network_weights` removes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gouache.files.record import ModelFile

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
    "layout": "layout.",
}
CONTEXT_SHIFT = 0.1
CONTEXT_SHIFT_KEY = "gouache.context_lift"  # in the header


def network_weights(file: ModelFile, network: str) -> dict[str, Tensor]:
    """One network's weights in float32, from a bundled file or any other with the original names."""
    prefix = PREFIXES[network]
    found = {name.removeprefix(prefix): file.tensor(name).float() for name in file if name.startswith(prefix)}
    if CONTEXT_SHIFT_KEY not in file.metadata:
        return found
    return shift_context(network, found, -float(file.metadata[CONTEXT_SHIFT_KEY]))


def shift_context(network: str, weights: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """The same network for a context with `by` added to every number. Apply it to "text" and "unet" together."""
    changed = dict(weights)
    if network == "text":
        changed["text_model.final_layer_norm.bias"] = weights["text_model.final_layer_norm.bias"] + by
    elif network == "unet":
        for name, out in weights.items():
            if name.endswith(".attn2.to_out.0.weight"):
                value = weights[name.replace("to_out.0", "to_v")]
                bias = name.replace("weight", "bias")
                changed[bias] = weights[bias] - out @ (value.sum(1) * by)
    return changed
