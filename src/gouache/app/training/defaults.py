"""Settings chosen for a model, a data set and a device: what somebody who trains for the first time needs not know."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import pictures, pretraining, sliders
from gouache.data import folders
from gouache.data.dataset import DataSet
from gouache.data.listing import CAPTIONS
from gouache.data.shard_records import ShardRecords
from gouache.data.shards import LARGE, OnIndexed
from gouache.data.subset import Subset
from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.model import residency
from gouache.model.inpainting import CHANNELS as INPAINTING_CHANNELS
from gouache.nn.spec import UNetSpec
from gouache.training import run_settings
from gouache.training.aliases import EPOCHS
from gouache.training.overrides import with_overrides
from gouache.training.run_settings import MODES, RunSettings
from gouache.training.targets.options import FORMS, RANKED

TRAINABLE = ("sd1", "sd2", "sdxl")
SIZES = ("tiny", "small", "sd1")
_FULL_WIDTH = 320  # channels of the first level of a released U-Net; narrower ones learn at higher rates
_EPOCHS = EPOCHS.partition(".")[2]
_PASSES = {"lora": 100, "dreambooth": 200, "finetune": 20, "embedding": 200, "hypernetwork": 200, "pretrain": 100}
_AVERAGED = ("dreambooth", "finetune", "pretrain")
_RATES_OF_MODES = {"embedding": 5e-3, "hypernetwork": 5e-5, "pretrain": 1e-4}  # as A1111's users choose them
_RATES = {"lion": 0.2, "schedule-free": 5.0}  # relative to AdamW's


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
    settings_file: Path | None = None,
    on_work: OnIndexed | None = None,
) -> RunSettings:
    """The settings of a new run: `overrides` ("key=value"), else those that the data set has, else chosen ones.

    The pictures are listed and the model's header is read, no weight. A `model` of "" is none given: most modes begin
    with the default one. Without an `output` the result is beside `settings_file`, to which the settings will be
    written, and usually has its name. `on_work` receives the progress of the index of tar shards. Raises GouacheError.
    """
    if mode not in MODES:
        raise RequestError("mode", f"{printable(mode, 40)!r} is not known; use {', '.join(MODES)}")
    # Those of other settings on which chosen ones depend; the rate of 1 only until the real one is known.
    given = with_overrides({"train": {"learning_rate": 1.0}}, overrides)
    steps = steps if steps is not None else _given_steps(given)
    given_data = given.get("data", {})
    folder = str(given_data.get("folder") or Path(data))
    trigger, class_word = given_data.get("trigger") or trigger, given_data.get("class_word") or class_word
    if mode == "pretrain":
        model = _pretrained(model, given, settings)
    elif mode != "slider" and not data and not given_data.get("folder"):
        raise RequestError("data.folder", "is missing; expected a folder of pictures or tar shards")
    model = model or names.DEFAULT
    file = open_model(names.resolve(str(given.get("model", {}).get("name") or model), settings))
    found = identify(file)
    spec = trainable(found)
    column = str(given_data.get("caption_column") or "")
    if mode == "slider":
        output = output or (settings_file and settings_file.with_suffix(".safetensors"))
        return _slider(data, model, output, steps, overrides, given, found, device=residency.device(
            given.get("device") or settings.device))  # fmt: skip
    suffixes = (extension,) if (extension := given_data.get("caption_extension")) else CAPTIONS
    subset = Subset(trigger=trigger, class_word=class_word, suffixes=suffixes)
    cache = pictures.index_cache(settings)
    dataset = folders.read(Path(folder), subset, caption_column=column, stream=True, cache=cache, on_work=on_work)
    own = pictures.settings_of(dataset)
    count = len(dataset.records)
    device = residency.device(given.get("device") or settings.device)
    form = str(given.get("adapter", {}).get("form") or ("none" if mode == "finetune" else "lora"))
    small = spec.channels < _FULL_WIDTH
    side = found.size.value[0] if found.size is not None else 512
    optimizer = str(given["train"].get("optimizer", ""))
    chosen: dict[str, Any] = {
        "mode": mode,
        "output": str(output or _output(mode, trigger, Path(folder), settings_file)),
        "model": {"name": model},
        "data": {
            "folder": folder,
            "trigger": trigger,
            "class_word": class_word,
            "resolution": [side],
            "bucket_step": 64 if side >= 512 else 8,
            "repeats": 1,
        },
        "memory": {"checkpointing": _needs_checkpointing(found, device)},
    }  # fmt: skip
    if isinstance(dataset.records, ShardRecords) and count > LARGE:
        chosen["data"] |= {"stream": True, "cache": False}
    if mode == "dreambooth":
        _dreambooth(chosen, given, count)
    if mode == "pretrain":
        _pretrain(chosen, given)
    if mode == "embedding":
        _embedding(chosen, given, dataset)
    elif given.get("embedding", {}).get("vectors"):
        chosen["embedding"] = {"rate": 10.0}  # vectors learn at higher rates than the factors of a LoRA
    if mode == "finetune":
        chosen["adapter"] = {"form": "none"}
        chosen["data"]["caption_dropout"] = 0.1
    resume = given.get("model", {}).get("resume") is True

    def checked(steps: int | None, fixed: Mapping[str, Any]) -> RunSettings:
        """The settings with the values that depend on `steps`; `fixed` come before everything else."""
        batch = _batch(mode, str(given.get("pretrain", {}).get("part", "")), count, small, device.type)
        train = _training(mode, form, count, batch, steps, small, spec.channels, optimizer)
        complete = {**chosen, "train": train | (_resume(train["steps"], file) if resume else {})}
        values = with_overrides(_merged(complete, own), overrides)
        values["train"].pop(_EPOCHS, None)
        return run_settings.checked(_merged(values, {"train": fixed}))

    epochs = given["train"].get(_EPOCHS)
    if epochs is None:
        return checked(steps, {})
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise RequestError("train.epochs", f"is {printable(str(epochs), 40)}; expected a whole number from 1")
    found_steps = pictures.steps_of(checked(steps, {}), epochs, settings, (side, side))
    return checked(found_steps, {"steps": found_steps})


def _slider(
    prompts: str,
    model: str,
    output: Path | None,
    steps: int | None,
    overrides: list[str],
    given: Mapping[str, Any],
    found: Found,
    device: torch.device,
) -> RunSettings:
    """Those of a run without pictures, as kohya's example has them."""
    channels, form = trainable(found).channels, str(given.get("adapter", {}).get("form") or "lora")
    optimizer = str(given["train"].get("optimizer", ""))
    if _EPOCHS in given["train"]:
        raise RequestError("train.epochs", "is for runs with pictures; set train.steps")
    train = _training("lora", form, 1, 1, steps or 500, channels < _FULL_WIDTH, channels, optimizer)
    named = next(filter(None, (given.get("slider", {}).get(key) for key in ("erase", "positive", "opposite"))), "")
    name = Path(prompts).stem or re.sub(r"\W+", "-", str(named)).strip("-")
    has_rank = form in FORMS and FORMS[form].parts in RANKED
    chosen = {
        "mode": "slider",
        "output": str(output or f"{name or 'slider'}.safetensors"),
        "model": {"name": model},
        "slider": {"file": prompts} if prompts else {},
        "adapter": {"rank": 8} if has_rank else {},
        "train": train,
        "memory": {"checkpointing": _needs_checkpointing(found, device)},
    }
    settings = run_settings.checked(with_overrides(chosen, overrides))
    both = any(each.multiplier < 0 for each in sliders.concepts_of(settings))
    if both or "strengths" in given.get("slider", {}):
        return settings
    return settings.model_copy(update={"slider": settings.slider.model_copy(update={"strengths": [0.0, 1.0]})})


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
    if part.spec.in_channels not in (part.spec.out_channels, INPAINTING_CHANNELS):
        raise ModelError(
            f"{where} has {part.spec.in_channels} input channels, for which there is no trainer; models with "
            f"{part.spec.out_channels} and inpainting models with {INPAINTING_CHANNELS} can be trained"
        )
    return part.spec


def _needs_checkpointing(found: Found, device: torch.device) -> bool:
    return device.type == "cuda" and found.family.value is not None and found.family.value.name == "sdxl"


def _batch(mode: str, part: str, pictures: int, small: bool, device: str) -> int:
    is_slow = device == "cpu" and not small
    if mode == "pretrain" and part == "text":  # which tells the pictures of a batch apart
        return max(2, min(16 if is_slow else 64, pictures))
    return 1 if is_slow else 4 if pictures >= 16 else 2 if pictures >= 4 else 1


def _training(
    mode: str, form: str, pictures: int, batch: int, steps: int | None, small: bool, channels: int, optimizer: str
) -> dict[str, Any]:
    # Adapters train some 100 passes over a small set and ever fewer over larger ones.
    passes = _PASSES[mode]
    usual = pictures * passes / batch / max(1.0, math.log2(max(2, pictures) / 8))
    chosen = steps if steps is not None else int(min(4000, max(300, round(usual, -2))))
    # All weights at once need a smaller rate than low-rank factors, those of a few pictures the smallest.
    rate = 1e-4 if form not in ("none", "full") else 5e-6 if mode == "dreambooth" else 1e-5
    rate = _RATES_OF_MODES.get(mode, rate) * min(8.0, _FULL_WIDTH / channels) * _RATES.get(optimizer, 1.0)
    if optimizer == "prodigy":
        rate = 1.0  # a factor of the rate that it estimates
    return {
        "steps": chosen,
        "batch": batch,
        "learning_rate": float(f"{rate:.2g}"),
        **({"schedule": "constant"} if optimizer == "schedule-free" else {}),
        "warmup": min(100, chosen // 10),
        "weight_decay": 0.01,
        "ema_decay": 0.999 if mode in _AVERAGED and optimizer != "schedule-free" else 0.0,
        "log_steps": max(1, min(50, chosen // 100)),
        # Some ten validations, so that over-fitting can be seen; in short runs each costs as much as some steps.
        "validate_steps": min(1000, max(10, chosen // 10)),
    }


def _dreambooth(chosen: dict[str, Any], given: Mapping[str, Any], pictures: int) -> None:
    data = chosen["data"]
    if not data["trigger"]:
        raise RequestError(
            "data.trigger", "is missing: DreamBooth needs a rare word for the subject, such as --trigger zorb"
        )
    prior = given.get("loss", {}).get("prior") or ("pictures" if data["class_word"] else "none")
    chosen["loss"] = {"prior": prior}
    if prior == "pictures" and not given.get("data", {}).get("class_folder"):
        data["class_pictures"] = max(50, 10 * pictures)


def _output(mode: str, trigger: str, folder: Path, settings_file: Path | None) -> Path:
    """The result's file: an embedding is named like its word, by which programs know it; others like the data, or the
    settings file, beside which it is.
    """
    if mode == "embedding":
        stem = re.sub(r'[/\\:*?"<>|]', "-", trigger)
    else:  # without the braces of a pattern
        stem = re.sub(r"[-_.]*\{.*", "", folder.stem) if settings_file is None else settings_file.stem
    name = f"{stem.strip('. ') or 'run'}{'.pt' if mode == 'hypernetwork' else '.safetensors'}"
    return Path(name) if settings_file is None else settings_file.with_name(name)


def _embedding(chosen: dict[str, Any], given: Mapping[str, Any], dataset: DataSet) -> None:
    """One vector, or those of the file to start from; pictures without captions have sentences with the word."""
    data = chosen["data"]
    if not data["trigger"]:
        raise RequestError(
            "data.trigger", "is missing: it is the word that prompts will say for the pictures, such as --trigger zorb"
        )
    plain = " ".join(filter(None, (data["trigger"], data["class_word"])))
    if all(record.captions == (plain,) for record in dataset.records):
        data["template"] = "subject"
    if not given.get("adapter", {}).get("start"):
        chosen["embedding"] = {"vectors": 1}


def _pretrained(model: str, given: Mapping[str, Any], settings: Settings) -> str:
    """The model of which a part is trained: `model`, or one of random weights, written unless it is there."""
    chosen, model = given.get("pretrain", {}), str(given.get("model", {}).get("name") or model)
    if not chosen.get("part"):
        raise RequestError("pretrain.part", f"is missing; expected {', '.join(pretraining.PARTS)}")
    size = chosen.get("initial_size")
    if not size and not model:
        raise RequestError(
            "pretrain.initial_size", f"is missing; expected {', '.join(SIZES)}, for random weights, or a model with -m"
        )
    if not size:
        return model
    if model:
        raise RequestError("pretrain.initial_size", f"is {printable(str(size), 40)}, but a model has its size; leave "
                           "out one of them")  # fmt: skip
    return str(pretraining.initial_model(str(size), int(given["train"].get("seed", 0)), settings))


def _pretrain(chosen: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Latent diffusion learns from captions that are sometimes missing; the two other parts see pictures, uncached."""
    data, part = chosen["data"], given.get("pretrain", {}).get("part", "unet")
    if part == "unet":
        data["caption_dropout"] = 0.1
    else:
        data["cache"] = False


def _resume(steps: int, file: ModelFile) -> dict[str, Any]:
    """Steps are counted on from those in a training checkpoint, whose schedule is not known: the rate is constant."""
    done = file.extra.get("global_step")
    return {"steps": done + steps, "schedule": "constant", "warmup": 0} if isinstance(done, int) else {}


def _given_steps(given: Mapping[str, Any]) -> int | None:
    """`train.steps` of the overrides, on which other values depend."""
    table = given.get("train")
    steps = table.get("steps") if isinstance(table, Mapping) else None
    return steps if type(steps) is int and steps > 0 else None


def _merged(chosen: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(chosen)
    for name, value in own.items():
        merged[name] = {**merged.get(name, {}), **value}
    return merged
