"""Values of other trainers' settings that have another form here: names of optimizers, absolute rates, `key=value`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from gouache.errors import RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text

LEVELS = 1000  # timesteps of all models that are trained
TEXT_RATES = ("parts.text_learning_rate", "parts.text_learning_rate_2")
"""Absolute learning rates of the text encoders, which become relative ones; see `overrides.with_overrides`."""


@dataclass(frozen=True)
class Meaning:
    """Settings, as `table.key`, and their values; `implied` ones only where nothing else sets them."""

    values: Mapping[str, JsonValue] = field(default_factory=dict)
    implied: Mapping[str, JsonValue] = field(default_factory=dict)


_OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adam",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "muon": "muon",
    "adamw8bit": "adamw8bit",
    "lion": "lion",
    "prodigy": "prodigy",
    "adamwschedulefree": "schedule-free",
    "schedule_free": "schedule-free",
}
_OPTIMIZERS_ELSEWHERE = {
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "AdEMAMix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
    "DAdaptation": "dadaptation.DAdaptAdam",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "CAME": "pytorch_optimizer.CAME",
}


def _optimizer(name: str, value: JsonValue) -> Meaning:
    text = _text(name, value)
    if text.lower() in _OPTIMIZERS:
        return Meaning({"train.optimizer": _OPTIMIZERS[text.lower()]})
    if text.lower() == "sgdnesterov":
        return Meaning({"train.optimizer": "sgd"}, {"train.optimizer_arguments": {"momentum": 0.9, "nesterov": True}})
    found = {key.lower(): path for key, path in _OPTIMIZERS_ELSEWHERE.items()}.get(text.lower())
    return Meaning({"train.optimizer": found or text})  # a dotted path, or refused by its name


def _optimizer_args(name: str, value: JsonValue) -> Meaning:
    arguments = _arguments(name, value)
    values: dict[str, JsonValue] = {
        f"train.{key}": arguments.pop(key) for key in ("weight_decay", "betas") if key in arguments
    }
    return Meaning(values | ({"train.optimizer_arguments": arguments} if arguments else {}))


def _schedule(name: str, value: JsonValue) -> Meaning:
    """kohya's and diffusers' schedules end at 0, and "constant" has no warm-up."""
    text = _text(name, value)
    known: dict[str, tuple[str, dict[str, JsonValue]]] = {
        "constant": ("constant", {"train.warmup": 0}),
        "constant_with_warmup": ("constant", {}),
        "linear": ("linear", {"train.final_rate": 0.0}),
        "cosine": ("cosine", {"train.final_rate": 0.0}),
        "cosine_with_restarts": ("cosine", {"train.final_rate": 0.0}),
        "cosine_with_min_lr": ("cosine", {}),
        "polynomial": ("polynomial", {"train.final_rate": 0.0, "train.power": 1.0}),
        "inverse_sqrt": ("inverse-sqrt", {"train.final_rate": 0.0}),
        "warmup_stable_decay": ("warmup-stable-decay", {"train.final_rate": 0.0}),
        "rex": ("rex", {"train.final_rate": 0.0}),
    }
    key = text.lower()
    if key not in known and "." not in text and key.replace("_", "-") not in ("warmup-stable-decay", "inverse-sqrt"):
        raise RequestError(
            name, f"{printable(text, 40)!r} is not available; use {', '.join(known)}, or the dotted path of a class"
        )
    schedule, implied = known.get(key, (text, {}))
    return Meaning({"train.schedule": schedule}, implied)


def _cycles(name: str, value: JsonValue) -> Meaning:
    """Of `cosine_with_restarts`; other schedules have none, see `aliases.together`."""
    return Meaning({"train.restarts": max(0, int(_number(name, value)) - 1)})


def _weight(name: str, value: JsonValue) -> Meaning:
    return Meaning({"loss.weighting": "min-snr", "loss.gamma": value} if value else {})


def _prediction(name: str, value: JsonValue) -> Meaning:
    if name == "v_parameterization":
        return Meaning({"model.prediction": "v" if switch(name, value) else "eps"})
    known = {"epsilon": "eps", "eps": "eps", "v_prediction": "v", "v": "v"}
    if (text := _text(name, value)) not in known:
        raise RequestError(name, f"{printable(text, 40)!r} is not available; use epsilon or v_prediction")
    return Meaning({"model.prediction": known[text]})


def _precision(name: str, value: JsonValue) -> Meaning:
    match value:
        case "no" | False:
            return Meaning({"memory.autocast": "no", "memory.dtype": "fp32"})
        case "bf16":
            return Meaning({"memory.autocast": "yes"})
    raise RequestError(
        name, f"{printable(str(value), 40)!r} is not available: half precision needs scaled losses; use bf16 or no"
    )


def _text_rate(name: str, value: JsonValue) -> Meaning:
    """Of one text encoder, or a list; 0 freezes it."""
    given = value if isinstance(value, list) else [value]
    rates = [_number(name, each) for each in given[:2]]
    keys = TEXT_RATES[1:] if name == "learning_rate_te2" else TEXT_RATES
    values: dict[str, JsonValue] = dict(zip(keys, rates))
    # Where only one of the two is given, the scripts train the other at the learning rate.
    implied: dict[str, JsonValue] = {"parts.text_rate_2": 1.0} if name == "learning_rate_te1" else {}
    implied |= {"parts.text_rate": 1.0} if name == "learning_rate_te2" else {}
    trains = any(rate > 0 for rate in rates)
    return Meaning(values, implied | ({"parts.text_encoder": True} if trains else {}))


def _stop_text(name: str, value: JsonValue) -> Meaning:
    steps = int(_number(name, value))
    if steps <= 0:  # 0 stops them before the first step, -1 is kohya's "not trained"
        return Meaning({"parts.text_encoder": False})
    return Meaning({"parts.text_stop": steps}, {"parts.text_encoder": True})


def _timestep(name: str, value: JsonValue) -> Meaning:
    share = _number(name, value) / LEVELS
    if not 0 <= share <= 1:
        raise RequestError(name, f"is {value}; expected 0 to {LEVELS}")
    return Meaning({f"loss.timestep_{name[:3]}": share})


def _loss(name: str, value: JsonValue) -> Meaning:
    return Meaning({"loss.loss": "smooth-l1" if value == "smooth_l1" else value})


def _save(name: str, value: JsonValue) -> Meaning:
    """kohya's scripts keep all that are saved."""
    return Meaning({f"train.save_{name.rpartition('_')[2]}": value}, {"train.keep": 1000})


def _extension(name: str, value: JsonValue) -> Meaning:
    text = _text(name, value)
    return Meaning({"data.caption_extension": text if text.startswith(".") else f".{text}"})


def _chunks(name: str, value: JsonValue) -> Meaning:
    if value in (150, 225):
        return Meaning()  # captions of any length are used, in chunks of 75 tokens
    raise RequestError(
        name, "is 150 or 225; captions are never cut off here, see `gouache dataset check` for those longer than 75"
    )


def _betas(name: str, value: JsonValue) -> Meaning:
    raise RequestError(name, "is not a setting of its own; use train.betas=[0.9, 0.999]")


def _class_pictures(name: str, value: JsonValue) -> Meaning:
    return Meaning({"data.class_pictures": value}, {"loss.prior": "pictures"})


def _prompts(name: str, value: JsonValue) -> Meaning:
    """kohya's file: a prompt per line, with options such as `--n NEGATIVE --d SEED --s STEPS` behind it."""
    if isinstance(value, list):
        return Meaning({"samples.prompts": value})
    text = _text(name, value)
    path = Path(text)
    if path.suffix.lower() != ".txt":
        return Meaning({"samples.prompts": [text]})
    prompts: list[JsonValue] = []
    options = list[dict[str, str]]()
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        if line.startswith("#"):
            continue
        prompt, *rest = re.split(r"\s--(?=\w)", line)
        prompts.append(prompt.strip())
        options.append({key: argument.strip() for key, _, argument in (each.partition(" ") for each in rest)})
    if not prompts:
        raise RequestError(name, f"{printable(text)} has no prompts; expected one per line")
    values: dict[str, JsonValue] = {"samples.prompts": prompts}
    for key, setting in (("n", "samples.negative"), ("s", "samples.steps"), ("d", "samples.seed")):
        found = {each[key] for each in options if key in each}
        if found and (len(found) > 1 or not all(key in each for each in options)) and key != "d":
            raise RequestError(name, f"{printable(text)} has different --{key}; all samples have the same {setting}")
        if found:
            first = options[0].get(key, "1")
            values[setting] = first if key == "n" else int(_number(f"{name} --{key}", first))
    return Meaning(values)


def _module(name: str, value: JsonValue) -> Meaning:
    text = _text(name, value)
    known: dict[str, Meaning] = {
        "networks.lora": Meaning(implied={"adapter.form": "lora"}),
        "networks.oft": Meaning({"adapter.form": "oft"}),
        "lycoris.kohya": Meaning(implied={"adapter.form": "locon", "adapter.modules": "conv"}),
    }
    if text not in known:
        raise RequestError(name, f"{printable(text, 40)!r} is not available; use {', '.join(known)}, or adapter.form")
    return known[text]


def _algo(name: str, value: JsonValue) -> Meaning:
    known = {"lora": "locon", "locon": "locon", "loha": "loha", "lokr": "lokr", "ia3": "ia3", "full": "full",
             "diag-oft": "oft"}  # fmt: skip
    if (text := _text(name, value)) not in known:
        raise RequestError(name, f"{printable(text, 40)!r} is not available; use {', '.join(known)}")
    # LyCORIS changes convolutions too.
    return Meaning({"adapter.form": known[text]}, {} if text == "ia3" else {"adapter.modules": "conv"})


def _preset(name: str, value: JsonValue) -> Meaning:
    known = {"full": "conv", "full-lin": "linear", "attn-only": "attention", "attn-mlp": "linear"}
    if (text := _text(name, value)) not in known:
        raise RequestError(name, f"{printable(text, 40)!r} is not available; use {', '.join(known)}")
    return Meaning({"adapter.modules": known[text]})


def _network_args(name: str, value: JsonValue) -> Meaning:
    """Those of kohya's LoRA and of LyCORIS, each as a setting of its own."""
    same = {"conv_dim": "conv_rank", "conv_alpha": "conv_alpha", "dropout": "dropout", "factor": "factor",
            "rank_dropout": "rank_dropout", "module_dropout": "module_dropout", "constraint": "constraint"}  # fmt: skip
    values, implied = dict[str, JsonValue](), dict[str, JsonValue]()
    arguments = _arguments(name, value)
    for key, argument in arguments.items():
        if key in same:
            values[f"adapter.{same[key]}"] = argument
        elif key == "dora_wd":
            form = str(arguments.get("algo", "lora"))
            if argument and form not in ("lora", "locon"):
                raise RequestError(name, f"dora_wd with algo={printable(form, 40)} is not available; use adapter.form")
            values |= {"adapter.form": "dora"} if argument else {}
        elif key in ("use_tucker", "use_scalar", "train_norm") and not argument:
            continue
        elif key == "loraplus_lr_ratio":
            values["adapter.plus_ratio"] = argument
        elif key in ("algo", "preset"):
            found = _algo(key, argument) if key == "algo" else _preset(key, argument)
            values = {**found.values, **values}  # "dora" stays
            implied |= found.implied
        else:
            raise RequestError(name, f"{printable(key, 40)} is not available; see the table [adapter] of the settings")
    return Meaning(values, implied)


CHANGED: Mapping[str, Callable[[str, JsonValue], Meaning]] = {
    "optimizer_type": _optimizer,
    "optimizer_args": _optimizer_args,
    "adam_beta1": _betas,
    "adam_beta2": _betas,
    "lr_scheduler": _schedule,
    "lr_scheduler_type": lambda name, value: Meaning({"train.schedule": value}),
    "lr_scheduler_args": lambda name, value: Meaning({"train.schedule_arguments": _arguments(name, value)}),
    "lr_scheduler_num_cycles": _cycles,
    "lr_num_cycles": _cycles,
    "min_snr_gamma": _weight,
    "snr_gamma": _weight,
    "v_parameterization": _prediction,
    "prediction_type": _prediction,
    "mixed_precision": _precision,
    "text_encoder_lr": _text_rate,
    "learning_rate_te": _text_rate,
    "learning_rate_te1": _text_rate,
    "learning_rate_te2": _text_rate,
    "stop_text_encoder_training": _stop_text,
    "min_timestep": _timestep,
    "max_timestep": _timestep,
    "loss_type": _loss,
    "save_every_n_steps": _save,
    "save_every_n_epochs": _save,
    "caption_extension": _extension,
    "max_token_length": _chunks,
    "bucket_no_upscale": lambda name, value: Meaning({"data.upscale": not switch(name, value)}),
    "num_class_images": _class_pictures,
    "sample_prompts": _prompts,
    "validation_prompt": _prompts,
    "sample_sampler": lambda name, value: Meaning({"samples.sampler": value}),
    "output_name": lambda name, value: Meaning({"output": f"{_text(name, value)}.safetensors"}),
    "learnable_property": lambda name, value: Meaning({"data.template": "style" if value == "style" else "subject"}),
    "network_module": _module,
    "network_args": _network_args,
    "algo": _algo,
    "preset": _preset,
}


def switch(name: str, value: JsonValue) -> bool:
    if not isinstance(value, bool):
        raise RequestError(name, f"is {printable(str(value), 40)}; expected true or false")
    return value


def _text(name: str, value: JsonValue) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(name, f"is {printable(str(value), 40)!r}; expected a name")
    return value


def _number(name: str, value: JsonValue) -> float:
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise RequestError(name, f"is {printable(str(value), 40)!r}; expected a number")


def _arguments(name: str, value: JsonValue) -> dict[str, JsonValue]:
    """{key: value} of `["key=value", ...]` or `key=value key=value`, as on kohya's command line."""
    if isinstance(value, dict):
        return dict(value)
    given = value if isinstance(value, list) else str(value).split()
    found = dict[str, JsonValue]()
    for each in given:
        key, sign, text = str(each).partition("=")
        if not sign:
            raise RequestError(name, f"has {printable(str(each), 40)!r}; expected key=value")
        found[key.strip()] = _argument(text.strip())
    return found


def _argument(text: str) -> JsonValue:
    if text in ("True", "False"):
        return text == "True"
    if "," in text and not text.startswith(("[", '"')):
        text = f"[{text.strip('()')}]"
    try:
        return parse_toml(f"value = {text}")["value"]
    except (MalformedText, KeyError):
        return text
