"""ModelSpec 1.0.1: the words by which a safetensors header says what a model is (Stability AI's specification)."""

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
    """What the names of the tensors do not say, in the words other tools use, so that the next reader need not guess.

    What is itself no more than a guess stays out. `component` is named where the file holds no more than that.
    """
    family = found.family.value
    if family is None or found.prediction is None or family.name not in ARCHITECTURES:
        return {}
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "/".join(filter(None, (ARCHITECTURES[family.name], component))),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": found.path.stem,
    }
    if found.prediction.sure != "guess":
        said["modelspec.prediction_type"] = "v" if found.prediction.value == "v" else "epsilon"
    if found.size is not None and found.size.sure == "certain":
        said["modelspec.resolution"] = "x".join(map(str, found.size.value))
    if found.zero_snr is not None and found.zero_snr.value:
        said["ss_zero_terminal_snr"] = "True"
    return said
