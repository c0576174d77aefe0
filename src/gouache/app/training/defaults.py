"""Settings chosen for a model, a data set and a device: what somebody who trains for the first time needs not know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from gouache.app import names
from gouache.app.settings import Settings
from gouache.data import folders
from gouache.data.subset import Subset
from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.model import residency
from gouache.nn.spec import UNetSpec
from gouache.training import run_settings
from gouache.training.run_settings import Mode, RunSettings

TRAINABLE = ("sd1", "sd2", "sdxl")
_FULL_WIDTH = 320  # channels of the first level of a released U-Net; narrower ones learn at higher rates


def choose(
    mode: str,
    data: str,
    model: str,
    *,
    output: Path | None,
    trigger: str,
    class_word: str,
    steps: int | None,
    overrides: list[str],
    settings: Settings,
) -> RunSettings:
    """The settings of a new run; `overrides` ("key=value") replace what is chosen here.

    The pictures are listed and the model's header is read, no weight. Raises GouacheError.
    """
    if mode not in get_args(Mode):
        raise RequestError("mode", f"{printable(mode, 40)!r} is not known; use {', '.join(get_args(Mode))}")
    path = names.resolve(model, settings)
    file = open_model(path)
    found = identify(file)
    spec = trainable(found)
    given = run_settings.with_overrides({}, overrides)
    pictures = folders.read(Path(data), Subset(trigger=trigger, class_word=class_word))
    steps = steps if steps is not None else _given_steps(given)
    device = residency.device(given.get("device") or settings.device)
    small = spec.channels < _FULL_WIDTH
    side = found.size.value[0] if found.size is not None else 512
    chosen: dict[str, Any] = {
        "mode": mode,
        "output": str(output or Path(f"{Path(data).stem or 'run'}.safetensors")),
        "model": {"name": model},
        "data": {
            "folder": str(Path(data)),
            "trigger": trigger,
            "class_word": class_word,
            "resolution": [side],
            "bucket_step": 64 if side >= 512 else 8,
            "repeats": 1,
        },
        "train": _training(mode, len(pictures.records), steps, small, spec.channels, device.type),
        "memory": {"checkpointing": device.type == "cuda" and found.family.value is not None
                   and found.family.value.name == "sdxl"},
    }  # fmt: skip
    if mode == "dreambooth":
        _dreambooth(chosen, class_word, len(pictures.records))
    if mode == "finetune":
        chosen["adapter"] = {"form": "none"}
        chosen["data"]["caption_dropout"] = 0.1
    if given.get("model", {}).get("resume") is True:
        _resume(chosen, file)
    return run_settings.checked(_merged(chosen, given))


def trainable(found: Found) -> UNetSpec:
    """The spec of the model's U-Net. Raises ModelError, in one line, for a model that cannot be trained."""
    where, family = printable(str(found.path)), found.family.value
    if family is None:
        raise ModelError(f"{where} cannot be trained: its family is {found.family.evidence}")
    if family.name not in TRAINABLE:
        raise ModelError(f"{where} is {family.title}, for which there is no trainer; SD1, SD2 and SDXL can be trained")
    part = found.components.get("unet")
    if part is None or not isinstance(part.spec, UNetSpec):
        raise ModelError(f"{where} has no U-Net to train: {found.missing.get('unet', 'it is not in the file')}")
    return part.spec


def _training(mode: str, pictures: int, steps: int | None, small: bool, channels: int, device: str) -> dict[str, Any]:
    batch = 1 if device == "cpu" and not small else 4 if pictures >= 16 else 2 if pictures >= 4 else 1
    # Adapters train some 100 passes over a small set and ever fewer over larger ones.
    passes = {"lora": 100, "dreambooth": 200, "finetune": 20}[mode]
    usual = pictures * passes / batch / max(1.0, math.log2(max(2, pictures) / 8))
    chosen = steps if steps is not None else int(min(4000, max(300, round(usual, -2))))
    rate = {"lora": 1e-4, "dreambooth": 1e-4, "finetune": 1e-5}[mode]
    rate *= min(8.0, _FULL_WIDTH / channels)
    return {
        "steps": chosen,
        "batch": batch,
        "learning_rate": float(f"{rate:.2g}"),
        "warmup": min(100, chosen // 10),
        "weight_decay": 0.01,
        "ema_decay": 0.0 if mode == "lora" else 0.999,
        "log_steps": max(1, min(50, chosen // 100)),
        # Some ten validations, so that over-fitting can be seen; in short runs each costs as much as some steps.
        "validate_steps": min(1000, max(10, chosen // 10)),
    }


def _dreambooth(chosen: dict[str, Any], class_word: str, pictures: int) -> None:
    if not chosen["data"]["trigger"]:
        raise RequestError(
            "trigger", "is missing: DreamBooth needs a rare word for the subject, such as --trigger zorb"
        )
    if class_word:
        chosen["data"]["class_pictures"] = max(50, 10 * pictures)
        chosen["loss"] = {"prior": "pictures"}
    else:
        chosen["loss"] = {"prior": "none"}


def _resume(chosen: dict[str, Any], file: ModelFile) -> None:
    """Steps are counted on from those in a training checkpoint, whose schedule is not known: the rate is constant."""
    done = file.extra.get("global_step")
    if isinstance(done, int):
        chosen["train"] |= {"steps": done + chosen["train"]["steps"], "schedule": "constant", "warmup": 0}


def _given_steps(given: Mapping[str, Any]) -> int | None:
    """`train.steps` of the overrides, on which other values depend."""
    table = given.get("train")
    steps = table.get("steps") if isinstance(table, Mapping) else None
    return steps if type(steps) is int and steps > 0 else None


def _merged(chosen: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(chosen)
    for name, value in given.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, Mapping) else value
    return merged
