"""ModelSpec 1.0.1 (Stability AI's specification): metadata in a safetensors header that describes the model."""

from __future__ import annotations

from gouache.families.found import Found

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "svd": "stable-video-diffusion-img2vid-v1",
}


def describe(found: Found, component: str = "") -> dict[str, str]:
    """Metadata for facts that tensor names do not show, under the keys that other tools use, so that later readers need
    not guess.

    Facts that are themselves guesses are left out. `component` is given if the file holds only that component.
    """
    family = found.family.value
    if family is None or found.prediction is None or family.name not in ARCHITECTURES:
        return {}
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "/".join(filter(None, (ARCHITECTURES[family.name], component))),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": found.path.stem,
    }
    if found.prediction.confidence != "guess":
        metadata["modelspec.prediction_type"] = "v" if found.prediction.value == "v" else "epsilon"
    if found.size is not None and found.size.confidence == "certain":
        metadata["modelspec.resolution"] = "x".join(map(str, found.size.value))
    if found.zero_snr is not None and found.zero_snr.value:
        metadata["ss_zero_terminal_snr"] = "True"
    return metadata
