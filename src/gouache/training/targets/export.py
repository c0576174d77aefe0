"""Trained weights as files that other tools read: adapters in three namings, and whole models in the original names.

parts of an adapter -> names of kohya's scripts, diffusers or PEFT -> one file, or a folder per component
trained weights     -> names of the base file, with its other tensors (and averages as model_ema.*) -> one file
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gouache.adapters import forms
from gouache.diffusion.schedule import Schedule
from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Component
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.files.write import describe, write_atomic
from gouache.layouts.modules import Module, kohya_names, peft_names
from gouache.model.model import Model
from gouache.training.targets.options import FORMS, AdapterOptions
from gouache.workshop import derive, layout, save
from gouache.workshop.modelspec import ARCHITECTURES
from gouache.workshop.modelspec import describe as describe_model
from gouache.workshop.prune import pruned

AdapterParts = Mapping[Module, Mapping[str, Tensor]]
"""{module: {part: tensor}}, with the part names of `adapters.patch`."""

NAMES = ("kohya", "diffusers", "peft")
FORMS_OF_MODELS = ("full", "pruned", "pruned-emaonly")


# ---- adapters


def export_adapter(
    parts: AdapterParts,
    model: Model,
    path: Path,
    names: str,
    metadata: Mapping[str, str],
    dtype: str = "fp32",
    more: Mapping[str, Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write an adapter under `names`, one of NAMES. `path` is a .safetensors file, for "peft" a folder.

    `more` are further tensors, which keep their dtype, of a file with kohya's names. Raises RequestError for a naming
    that this form does not have.
    """
    if names not in NAMES:
        raise RequestError("names", f"{printable(names, 40)!r} is not known; use {', '.join(NAMES)}")
    if names == "peft":
        _write_peft(parts, model, path, metadata, dtype, overwrite)
        return
    if path.suffix.lower() != ".safetensors":
        raise RequestError("output", f"{save.shown(path)} does not end in .safetensors, the format of adapters")
    tensors = _kohya(parts, model) if names == "kohya" else _diffusers(parts, model)
    if names == "diffusers":  # its loader takes network settings in kohya's metadata for kohya's names
        metadata = {key: text for key, text in metadata.items() if not key.startswith("ss_network_")}
    file = in_memory(path, {**tensors, **(more or {})}, {**metadata, "sshs_model_hash": ""})
    file = derive.cast(file, dtype, set(more or {}))
    save.write_file(file, path, "safetensors", what="exporting", overwrite=overwrite)


def in_memory(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> ModelFile:
    """`tensors` as a record of a file to be written."""
    infos = {name: describe(tensor) for name, tensor in tensors.items()}
    return ModelFile(path, "safetensors", infos, tensors.__getitem__, metadata or {})


def _kohya(parts: AdapterParts, model: Model) -> dict[str, Tensor]:
    stems = kohya_names(model.specs, model.family.name.startswith("sdxl"))
    tensors: dict[str, Tensor] = {}
    for module, own in parts.items():
        for part, tensor in _kohya_parts(own).items():
            tensors[f"{stems[module]}.{part}"] = tensor
    return tensors


def _kohya_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if foreign := sorted({"ia3_l", "oft_R.weight", "boft_R"} & set(parts)):
        raise RequestError("names", f"kohya's files have no form for {foreign[0]}, which PEFT trained; use peft")
    found = dict(parts)
    if "diff" in found and found["diff"].ndim == 1:
        found = {{"diff": "w_norm", "diff_b": "b_norm"}.get(part, part): tensor for part, tensor in found.items()}
    if "dora_rows" in found:
        rows = found.pop("dora_rows")
        found["dora_scale"] = rows.reshape(-1, *[1] * (found["lora_down.weight"].ndim - 1))
    return _without_scale(found) if "scale" in found else found


def _without_scale(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change with a scale of 1: it multiplies the first factor, and alpha is the rank."""
    rank_part = next((name for name in ("lora_down.weight", "hada_w1_b", "lokr_w2_b") if name in parts), None)
    first = next(name for name in ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a") if name in parts)
    rank = len(parts[rank_part]) if rank_part is not None else 1
    # Two full factors of a LoKr are not scaled.
    factor = forms.scale(parts, rank) if rank_part is not None or "alpha" not in parts else 1.0
    rest = {name: part for name, part in parts.items() if name not in ("alpha", "scale", "scalar")}
    return {**rest, first: parts[first] * factor, "alpha": torch.tensor(float(rank))}


def _diffusers(parts: AdapterParts, model: Model) -> dict[str, Tensor]:
    # The loader of text encoders knows magnitudes by the name of their parameter only.
    named = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
    stems = peft_names(model.specs)
    return {
        f"{stems[module]}.{named.get(suffix, suffix)}": tensor
        for module, own in parts.items()
        for suffix, tensor in _peft_parts(own, ("lora",), "diffusers' pipelines read LoRA and DoRA").items()
    }


def _write_peft(
    parts: AdapterParts, model: Model, path: Path, metadata: Mapping[str, str], dtype: str, overwrite: bool
) -> None:
    if path.suffix:
        raise RequestError("output", f"{save.shown(path)} has a suffix; PEFT's adapters are folders, name one")
    stems = peft_names(model.specs)
    for component in dict.fromkeys(component for component, _ in parts):
        own = {
            stems[module].removeprefix(f"{component}."): _peft_parts(each, tuple(_PEFT), "PEFT reads these forms")
            for module, each in parts.items()
            if module[0] == component
        }
        folder = path / component
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"base_model.model.{stem}.{name}": t for stem, each in own.items() for name, t in each.items()}
        file = in_memory(folder / "adapter_model.safetensors", tensors, {**metadata, "format": "pt"})
        save.write_file(derive.cast(file, dtype), file.path, "safetensors", what="exporting", overwrite=overwrite)
        config = json.dumps(_peft_config(own), indent=2, sort_keys=True).encode()
        with save.writing(folder / "adapter_config.json", overwrite):
            write_atomic(folder / "adapter_config.json", config)


_PEFT: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # form: (PEFT's name, parts that identify it)
    "lora": ("LORA", ("lora_up.weight",)),
    "loha": ("LOHA", ("hada_w1_a",)),
    "lokr": ("LOKR", ("lokr_w1", "lokr_w1_a")),
    "ia3": ("IA3", ("weight", "ia3_l")),
}


def _form_of(parts: Iterable[str]) -> str:
    return next((form for form, (_, marks) in _PEFT.items() if set(marks) & set(parts)), "")


def _peft_parts(parts: Mapping[str, Tensor], allowed: tuple[str, ...], reason: str) -> dict[str, Tensor]:
    """The parts under PEFT's names, with a scale of 1. Raises RequestError for a form that is not `allowed`."""
    form = _form_of(parts)
    magnitudes = parts.get("dora_rows", parts.get("dora_scale"))
    by_column = magnitudes is not None and magnitudes.ndim > 1 and magnitudes.shape[0] == 1
    core = any(name in parts for name in ("lora_mid.weight", "hada_t1", "lokr_t2", "diff_b", "bias_values"))
    if form not in allowed or core or by_column or (magnitudes is not None and form != "lora"):
        has = ", ".join(part for part in parts if part not in ("alpha", "on_input"))
        raise RequestError("names", f"{reason} ({', '.join(allowed)}); this adapter has {has}; use kohya")
    if form == "ia3":
        if "ia3_l" in parts:
            return {"ia3_l": parts["ia3_l"]}
        factor = 1 + parts["weight"]
        return {"ia3_l": factor[None] if bool(parts["on_input"]) else factor[:, None]}
    scaled = _without_scale({name: part for name, part in parts.items() if name not in ("dora_rows", "dora_scale")})
    del scaled["alpha"]
    if form != "lora":
        return scaled
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    named = {names[name]: part for name, part in scaled.items()}
    if magnitudes is not None:
        kernel = named["lora_A.weight"].shape[2:]
        named["lora_magnitude_vector"] = magnitudes.reshape(1, -1, 1, 1) if kernel else magnitudes.flatten()
    return named


def _peft_config(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, object]:
    """PEFT's configuration for these modules, with alpha equal to each rank."""
    form = _form_of(_kohya_marks(next(iter(parts.values()))))
    config: dict[str, object] = {"peft_type": _PEFT[form][0], "target_modules": list(parts), "inference_mode": True}
    if form == "ia3":
        fed = [stem for stem, each in parts.items() if each["ia3_l"].shape[0] == 1]
        return config | {"feedforward_modules": fed}
    ranks = {stem: _rank(each) for stem, each in parts.items()}
    usual = max(ranks.values())
    others = {stem: rank for stem, rank in ranks.items() if rank != usual}
    alpha = {"lora_alpha": usual} if form == "lora" else {"alpha": usual}
    config |= {"r": usual, **alpha, "rank_pattern": others, "alpha_pattern": others}
    if form == "lora":
        config["use_dora"] = any("lora_magnitude_vector" in each for each in parts.values())
    return config


def _kohya_marks(parts: Iterable[str]) -> set[str]:
    return {{"lora_B.weight": "lora_up.weight"}.get(part, part) for part in parts}


def _rank(parts: Mapping[str, Tensor]) -> int:
    """The rank that PEFT must have to build these parts; two full factors of a LoKr need one that is large enough."""
    found = next((name for name in ("lora_A.weight", "hada_w1_b", "lokr_w2_b") if name in parts), None)
    return len(parts[found]) if found is not None else max(parts["lokr_w2"].shape[:2])


def adapter_metadata(model: Model, options: AdapterOptions, parts: AdapterParts, title: str) -> dict[str, str]:
    """What kohya's scripts and ModelSpec state of an adapter in its header, without the facts of the run."""
    ranks = [len(each["lora_down.weight"]) for each in parts.values() if "lora_down.weight" in each]
    plain = options.base_form == "lora" and not options.trains_magnitudes and not options.norms
    arguments: dict[str, str] = {}
    if not plain:
        arguments["algo"] = {"lora": "locon", "oft": "diag-oft"}.get(options.base_form, options.base_form)
    if options.trains_magnitudes:
        arguments |= {"dora_wd": "True", "wd_on_output": "True"}
    if options.conv_rank is not None or FORMS[options.form].modules == "conv":
        rank, alpha = _convolutions(options)
        arguments |= {"conv_dim": str(rank), "conv_alpha": f"{alpha:g}"}
    return {
        **model_metadata(model, "lora", title),
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(max(ranks, default=options.rank)),
        "ss_network_alpha": f"{options.rank if options.alpha is None else options.alpha:g}",
        "ss_network_args": json.dumps(arguments),
    }


def model_metadata(model: Model, kind: str, title: str) -> dict[str, str]:
    """What they state of the model that a file of this `kind` is for: lora, or textual-inversion."""
    family, v2 = model.family.name, model.family.name == "sd2"
    v_prediction = model.prediction == "v"
    version = "sdxl_base_v1-0" if family.startswith("sdxl") else f"sd_v{2 if v2 else 1}{'_v' * v_prediction}"
    described = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "ss_v2": str(v2),
        "ss_base_model_version": version,
    }
    if family in ARCHITECTURES:
        described["modelspec.architecture"] = f"{ARCHITECTURES[family]}/{kind}"
    if v_prediction:
        described["ss_v_parameterization"] = "True"
    if has_zero_terminal_snr(model.schedule):
        described["ss_zero_terminal_snr"] = "True"
    return described


def _convolutions(options: AdapterOptions) -> tuple[int, float]:
    rank = options.rank if options.conv_rank is None else options.conv_rank
    alpha = options.conv_alpha if options.conv_alpha is not None else options.alpha
    return rank, float(rank) if alpha is None else alpha


# ---- models


@dataclass(frozen=True)
class Averages:
    """Averaged weights (EMA) under the names of the weights, with what original files store of them."""

    weights: Mapping[str, Tensor]
    decay: float
    updates: int


def export_model(
    weights: Mapping[str, Mapping[str, Tensor]],
    model: Model,
    path: Path,
    form: str,
    metadata: Mapping[str, str],
    averages: Averages | None = None,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the file of `model` with the trained `weights` ({component: {name in the network: tensor}}).

    "full" keeps everything that the file has and adds the averages of the U-Net as `model_ema.*`; "pruned" leaves out
    what is not part of the model; "pruned-emaonly" has the averages under the names of the weights. Without averages
    "pruned-emaonly" is a RequestError. The names are those of the original file, also if the base is a folder. `dtype`
    is that of the trained weights and their averages; what was not trained stays as it is, bit for bit.
    """
    if form not in FORMS_OF_MODELS:
        raise RequestError("form", f"{printable(form, 40)!r} is not a form of models; use {', '.join(FORMS_OF_MODELS)}")
    if form == "pruned-emaonly" and averages is None:
        raise RequestError("form", "pruned-emaonly needs averages, and the run keeps none; use pruned")
    target = save.single_form_of(path)
    base, found = layout.opened(model.file.path, prediction=model.prediction, family=model.family.name)
    replaced = dict(weights)
    if form == "pruned-emaonly" and averages is not None:
        replaced = {part: _averaged(part, tensors, averages) for part, tensors in weights.items()}
    parts = [_in_file_names(found.component(part), tensors, model, path) for part, tensors in replaced.items()]
    gone = {
        source for part in replaced for origin in found.component(part).origins.values() for source in origin.sources
    }
    gone |= {name for name in base if name.startswith(layout.AVERAGES) or name in MARKERS}
    rest = derive.keep(base, (name for name in base if name not in gone))
    extras = _markers(model)
    if averages is not None:
        extras |= {
            "model_ema.decay": torch.tensor(averages.decay),
            "model_ema.num_updates": torch.tensor(averages.updates, dtype=torch.int32),
        }
        if form != "pruned-emaonly":
            extras |= {average_name(name): tensor for name, tensor in _part(averages.weights, "unet").items()}
    file = derive.join(rest, *parts, in_memory(path, extras))
    unchanged = {*rest, *(name for name in extras if not name.startswith("model_ema.diffusion_model"))}
    file = derive.cast(file, dtype, unchanged)
    stated = {key: text for key, text in base.metadata.items() if not key.startswith(("modelspec.hash", "sshs_"))}
    file = replace(file, path=path, format="safetensors", metadata=stated, extra={}, notes=())
    described = identify(file, prediction=model.prediction, family=model.family.name)
    if form != "full":
        file, _ = pruned(file, described, "both" if averages is not None and form == "pruned" else "last", ())
    file = save.with_metadata(file, {**describe_model(described), "modelspec.title": path.stem, **metadata})
    save.write_file(
        file, path, target, what="exporting", check=lambda at: save.compare(open_model(at), file), overwrite=overwrite
    )


MARKERS = ("v_pred", "ztsnr")
"""Empty tensors by which web UIs recognise what a U-Net of SD1 or SDXL predicts, and its noise levels."""


def _markers(model: Model) -> dict[str, Tensor]:
    markers = {"v_pred": model.prediction == "v" and model.family.name != "sd2",
               "ztsnr": has_zero_terminal_snr(model.schedule)}  # fmt: skip
    return {name: torch.empty(0) for name, needed in markers.items() if needed}


def has_zero_terminal_snr(schedule: Schedule) -> bool:
    """Whether the last of its levels has no signal."""
    return not schedule.continuous and float(schedule.alphas_cumprod[-1]) < 1e-7


def average_name(name: str) -> str:
    """The name of an average of the U-Net's tensor `name` in original files: all dots removed."""
    return layout.AVERAGES + f"diffusion_model.{name}".replace(".", "")


def _part(weights: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    prefix = f"{component}."
    return {name.removeprefix(prefix): t.detach().cpu() for name, t in weights.items() if name.startswith(prefix)}


def _averaged(component: str, tensors: Mapping[str, Tensor], averages: Averages) -> dict[str, Tensor]:
    own = _part(averages.weights, component)
    return {name: own[name].to(tensor.dtype) if name in own else tensor for name, tensor in tensors.items()}


def _in_file_names(part: Component, tensors: Mapping[str, Tensor], model: Model, path: Path) -> ModelFile:
    """The tensors of one component under their names in the base file."""
    if missing := sorted(set(part.origins) ^ set(tensors)):
        raise ModelError(f"the weights of {part.name} are not complete: {printable(missing[0])} is missing or unknown")
    return layout.as_in(part, in_memory(path, tensors), model.family)
