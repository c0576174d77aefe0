"""Determines what a network predicts (noise or velocity) and its noise levels, from hints sorted by strength.

Shapes do not show it. So the hints are marker tensors that tools add, metadata, a folder's scheduler, a configuration
file next to the model, the training step in a pickle, and for SD2, where half of the models are of either sort, the
standard deviation of one bias in the first norm of the last transformer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gouache.errors import FileError, printable
from gouache.families.components import Candidate
from gouache.families.family import Family, NoiseLevels
from gouache.families.found import Fact, strongest
from gouache.families.sd import SD2
from gouache.files.record import ModelFile
from gouache.outside import open_outside

PREDICTIONS = ("eps", "v", "edm")
""" "edm" is the mix of noise and picture of Karras et al. 2022, equation 7 (Playground 2.5)."""

_WORDS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "vpred": "v"}
_SD2_STEPS = {875000: "eps", 220000: "eps", 110000: "v"}
_SIDECAR_LIMIT = 65536  # bytes; real ones have about 3000
_SD2_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_BIAS_DEVIATION = 0.09


def prediction(
    file: ModelFile, family: Family, variant: str | None, unet: Candidate | None, override: str | None
) -> Fact[str]:
    """What the U-Net of `file` predicts: "eps", "v" or "edm". Weights are read only if nothing else shows it."""
    option = Fact(override, "set by the caller", "override") if override is not None else None
    fact = strongest(_hints(file, family, variant), option)
    if fact is None and family is SD2 and variant == "base" and unet is not None:
        fact = _by_bias(file, unet)
    if fact is None:
        # SD2 models are about half of each sort; in the other lines, models that differ from the default are marked.
        confidence = "guess" if family is SD2 else "likely"
        fact = Fact(
            family.prediction, f"nothing in the file states it; most models of {family.title} predict it", confidence
        )
    return fact


def zero_snr(file: ModelFile) -> Fact[bool]:
    """Whether the last noise level has no signal at all (zero terminal SNR)."""
    if "ztsnr" in file:
        return Fact(True, "the file has the marker tensor ztsnr", "certain")
    if file.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        return Fact(True, "the metadata states ss_zero_terminal_snr = True", "certain")
    scheduler = _scheduler(file)
    if "rescale_betas_zero_snr" in scheduler:
        value = bool(scheduler["rescale_betas_zero_snr"])
        return Fact(value, f"the folder's scheduler states rescale_betas_zero_snr = {value}", "certain")
    return Fact(False, "nothing in the file states it", "likely")


def levels(file: ModelFile, family: Family) -> Fact[NoiseLevels]:
    """The noise levels: those of the family, unless the file has the two ends of a continuous range of sigmas."""
    ends = {"low": "edm_vpred.sigma_min", "high": "edm_vpred.sigma_max"}
    stated = {end: name for end, name in ends.items() if name in file and file.tensors[name].elements == 1}
    if "high" not in stated:
        return Fact(family.levels, f"the noise levels of {family.title}", "likely")
    values = {end: file.tensor(name).item() for end, name in stated.items()}
    low = float(values.get("low", 0.002))
    evidence = "the file has the marker tensor edm_vpred.sigma_max"
    return Fact(NoiseLevels("edm", low, float(values["high"])), evidence, "certain")


def _hints(file: ModelFile, family: Family, variant: str | None) -> Iterator[Fact[str]]:
    if "edm_vpred.sigma_max" in file:
        yield Fact("v", "the file has the marker tensor edm_vpred.sigma_max", "certain")
    if "v_pred" in file:
        yield Fact("v", "the file has the marker tensor v_pred", "certain")
    if "edm_mean" in file and "edm_std" in file:
        yield Fact("edm", "the file has the marker tensors edm_mean and edm_std", "certain")
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if (word := file.metadata.get(key, "").lower()) in _WORDS:
            yield Fact(_WORDS[word], f"the metadata states {key} = {word!r}", "certain")
    if file.metadata.get("ss_v_parameterization", "").lower() == "true":
        yield Fact("v", "the metadata states ss_v_parameterization = True", "certain")
    if scheduler := _scheduler(file):
        word = str(scheduler.get("prediction_type", "epsilon"))
        if word in _WORDS:
            stated = "prediction_type" in scheduler
            how = f"states prediction_type = {word!r}" if stated else "states no prediction_type, hence epsilon"
            yield Fact(_WORDS[word], f"the folder's scheduler {how}", "certain")
    yield from _sidecar(file.path)
    if file.metadata.get("modelspec.architecture", "").endswith("-768-v"):
        yield Fact("v", "the metadata states modelspec.architecture = '...-768-v'", "likely")
    if family is SD2:
        step = file.extra.get("global_step")
        if isinstance(step, int) and step in _SD2_STEPS:
            yield Fact(_SD2_STEPS[step], f"global_step is {step}, as in Stability AI's file", "likely")
        if variant in ("inpainting", "depth"):
            yield Fact("eps", f"Stability AI's {variant} model of this line predicts noise", "likely")


def _scheduler(file: ModelFile) -> dict[str, Any]:
    config = file.extra.get("scheduler/scheduler_config.json")
    return config if isinstance(config, dict) else {}


def _sidecar(path: Path) -> Iterator[Fact[str]]:
    """Hints from the original configuration, a .yaml file with the model's name in the same folder."""
    sidecar = path.with_suffix(".yaml")
    try:
        with open_outside(sidecar) as file:
            text = file.read(_SIDECAR_LIMIT).decode("utf-8", "replace")
    except (OSError, FileError):  # an absent or unreadable hint is ignored
        return
    name = printable(sidecar.name)
    stated = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
    scaling = re.search(r"\.(V|Eps)Scaling(?:WithEDMcNoise)?\b", text)
    if stated is not None and stated[1] in _WORDS:
        yield Fact(_WORDS[stated[1]], f"{name} in its folder states parameterization: {stated[1]}", "certain")
    elif scaling is not None:
        yield Fact(scaling[1].lower(), f"{name} in its folder states {scaling[0][1:]}", "certain")
    elif re.search(r"\bldm\.models\.diffusion\.ddpm\.", text):
        yield Fact("eps", f"{name} in its folder states no parameterization, hence epsilon", "certain")


def _by_bias(file: ModelFile, unet: Candidate) -> Fact[str] | None:
    """SD2's v-prediction models have a large deviation of this bias: an observation on the released models only."""
    origin = unet.plan.origins.get(_SD2_BIAS)
    if origin is None:
        return None
    bias = origin.tensor(file.tensor)
    deviation = float(bias.float().std(correction=0))
    value, than = ("v", "above") if deviation > _SD2_BIAS_DEVIATION else ("eps", "not above")
    released = SD2.unet is not None and bias.shape == (SD2.unet.channels,)
    evidence = f"{origin.sources[0]} has a standard deviation of {deviation:.3f}, {than} {_SD2_BIAS_DEVIATION}"
    return Fact(value, evidence, "likely" if released else "guess")
