"""What a network predicts (noise or velocity) and on which noise levels: hints in the order of their strength.

Weights and shapes do not say it. So the hints are marker tensors that tools add, metadata, a folder's scheduler, a
configuration beside the file, the training step of a pickle, and for SD2, where half the models are of either sort,
the spread of one bias of the last transformer's first norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gouache.errors import printable
from gouache.families.components import Reading
from gouache.families.family import Family, Levels
from gouache.families.found import Fact, settle
from gouache.families.sd import SD2
from gouache.files.record import ModelFile

PREDICTIONS = ("eps", "v", "edm")
""" "edm" is the mixture of noise and picture of Karras et al. 2022, equation 7 (Playground 2.5)."""

_WORDS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "vpred": "v"}
_SD2_STEPS = {875000: "eps", 220000: "eps", 110000: "v"}
_SIDECAR_LIMIT = 65536  # bytes; real ones have some 3000
_TELLING_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TELLING_SPREAD = 0.09


def prediction(
    file: ModelFile, family: Family, variant: str | None, unet: Reading | None, told: str | None
) -> Fact[str]:
    """What the U-Net of `file` predicts: "eps", "v" or "edm". Weights are read only where nothing else says it."""
    said = Fact(told, "told by the caller", "told") if told is not None else None
    fact = settle(_hints(file, family, variant), said)
    if fact is None and family is SD2 and variant == "base" and unet is not None:
        fact = _spread(file, unet)
    if fact is None:
        # SD2 is as often one as the other; in the other lines, a model that departs from the rule is marked.
        sure = "guess" if family is SD2 else "likely"
        fact = Fact(
            family.prediction, f"nothing in the file says it; it is what most models of {family.title} predict", sure
        )
    return fact


def zero_snr(file: ModelFile) -> Fact[bool]:
    """Whether the last noise level holds no signal at all (zero terminal SNR)."""
    if "ztsnr" in file:
        return Fact(True, "the file holds the marker ztsnr", "certain")
    if file.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        return Fact(True, "the metadata says ss_zero_terminal_snr = True", "certain")
    scheduler = _scheduler(file)
    if "rescale_betas_zero_snr" in scheduler:
        value = bool(scheduler["rescale_betas_zero_snr"])
        return Fact(value, f"the folder's scheduler says rescale_betas_zero_snr = {value}", "certain")
    return Fact(False, "nothing in the file says so", "likely")


def levels(file: ModelFile, family: Family) -> Fact[Levels]:
    """The noise levels, which are the family's but for files that carry the ends of a continuous range."""
    ends = {"low": "edm_vpred.sigma_min", "high": "edm_vpred.sigma_max"}
    stated = {end: name for end, name in ends.items() if name in file and file.tensors[name].elements == 1}
    if "high" not in stated:
        return Fact(family.levels, f"those of {family.title}", "likely")
    values = {end: file.tensor(name).item() for end, name in stated.items()}
    low = float(values.get("low", 0.002))
    return Fact(Levels("edm", low, float(values["high"])), "the file holds the marker edm_vpred.sigma_max", "certain")


def _hints(file: ModelFile, family: Family, variant: str | None) -> Iterator[Fact[str]]:
    if "edm_vpred.sigma_max" in file:
        yield Fact("v", "the file holds the marker edm_vpred.sigma_max", "certain")
    if "v_pred" in file:
        yield Fact("v", "the file holds the marker v_pred", "certain")
    if "edm_mean" in file and "edm_std" in file:
        yield Fact("edm", "the file holds the markers edm_mean and edm_std", "certain")
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if (word := file.metadata.get(key, "").lower()) in _WORDS:
            yield Fact(_WORDS[word], f"the metadata says {key} = {word!r}", "certain")
    if file.metadata.get("ss_v_parameterization", "").lower() == "true":
        yield Fact("v", "the metadata says ss_v_parameterization = True", "certain")
    if scheduler := _scheduler(file):
        word = str(scheduler.get("prediction_type", "epsilon"))
        if word in _WORDS:
            how = f"says prediction_type = {word!r}" if "prediction_type" in scheduler else "names none, hence noise"
            yield Fact(_WORDS[word], f"the folder's scheduler {how}", "certain")
    yield from _sidecar(file.path)
    if file.metadata.get("modelspec.architecture", "").endswith("-768-v"):
        yield Fact("v", "the metadata says modelspec.architecture = '...-768-v'", "likely")
    if family is SD2:
        step = file.extra.get("global_step")
        if isinstance(step, int) and step in _SD2_STEPS:
            yield Fact(_SD2_STEPS[step], f"global_step is {step}, as in Stability AI's own file", "likely")
        if variant in ("inpainting", "depth"):
            yield Fact("eps", f"Stability AI's {variant} model of this line predicts noise", "likely")


def _scheduler(file: ModelFile) -> dict[str, Any]:
    config = file.extra.get("scheduler/scheduler_config.json")
    return config if isinstance(config, dict) else {}


def _sidecar(path: Path) -> Iterator[Fact[str]]:
    """The original configuration, which users put beside the file under the same name."""
    beside = path.with_suffix(".yaml")
    try:
        if not beside.is_file():
            return
        with beside.open("rb") as file:
            text = file.read(_SIDECAR_LIMIT).decode("utf-8", "replace")
    except OSError:  # a hint that cannot be read is no hint
        return
    name = printable(beside.name)
    stated = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
    scaling = re.search(r"\.(V|Eps)Scaling(?:WithEDMcNoise)?\b", text)
    if stated is not None and stated[1] in _WORDS:
        yield Fact(_WORDS[stated[1]], f"{name} beside it says parameterization: {stated[1]}", "certain")
    elif scaling is not None:
        yield Fact(scaling[1].lower(), f"{name} beside it says {scaling[0][1:]}", "certain")
    elif re.search(r"\bldm\.models\.diffusion\.ddpm\.", text):
        yield Fact("eps", f"{name} beside it states no parameterization, hence noise", "certain")


def _spread(file: ModelFile, unet: Reading) -> Fact[str] | None:
    """Velocity models of SD2 have this bias spread wide: known from the released ones, no law of nature."""
    origin = unet.plan.origins.get(_TELLING_BIAS)
    if origin is None:
        return None
    bias = origin.tensor(file.tensor)
    spread = float(bias.float().std(correction=0))
    value, than = ("v", "above") if spread > _TELLING_SPREAD else ("eps", "not above")
    released = SD2.unet is not None and bias.shape == (SD2.unet.channels,)
    evidence = f"{origin.sources[0]} has a standard deviation of {spread:.3f}, {than} {_TELLING_SPREAD}"
    return Fact(value, evidence, "likely" if released else "guess")
