"""ModelFile -> Found: what a file is, from its names, shapes and metadata, each statement with its evidence.

Nothing of the weights is read, save one small tensor where SD2 leaves no other way to tell its prediction. What the
caller states overrides, and what contradicts it is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import replace

from gouache.errors import RequestError, printable
from gouache.families.catalog import family_named
from gouache.families.components import Reading, config, finish, read_components
from gouache.families.family import COMMON_LEFTOVERS, Family
from gouache.families.found import Component, Fact, Found, settle
from gouache.families.match import family_hints, family_of_width, metadata_hints
from gouache.families.others import image_tower, other_kind
from gouache.families.prediction import PREDICTIONS, levels, zero_snr
from gouache.families.prediction import prediction as predicts
from gouache.files.record import ModelFile
from gouache.layouts.adapters import AdapterNames, EmbeddingNames, read_adapter, read_embedding, read_hypernetwork
from gouache.layouts.rules import plan
from gouache.nn.spec import UNetSpec, VaeSpec


def identify(file: ModelFile, *, prediction: str | None = None, family: str | None = None) -> Found:
    """What `file` is. `prediction` ("eps", "v", "edm") and `family` (a name of the catalog) override what it seems.

    RequestError for an override that is none of the known; a file that cannot be made out is "unknown", not an error.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise RequestError("prediction", f"{prediction!r} is not known; there are {', '.join(PREDICTIONS)}")
    told = Fact[Family | None](family_named(family), "told by the caller", "told") if family is not None else None
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if (adapter := read_adapter(shapes)) is not None:
        return _adapter(file, adapter, told)
    if (widths := read_hypernetwork(shapes)) is not None:
        return _hypernetwork(file, widths, told)
    if (embedding := read_embedding(shapes, file.extra)) is not None:
        return _embedding(file, embedding, told)
    if (other := other_kind(shapes)) is not None:
        width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
        return _small(file, other, None, _by_width(file, width, f"it attends to prompts {width} wide", told))
    return _model(file, prediction, told)


def _model(file: ModelFile, told_prediction: str | None, told: Fact[Family | None] | None) -> Found:
    common = plan(COMMON_LEFTOVERS, file.tensors)
    averages = {name for name in common.unnamed if name.startswith("model_ema.")}
    readings, rest = read_components(file, (name for name in common.unnamed if name not in averages))
    hints = family_hints(readings, file.metadata, file.path.name)
    fact = settle(hints, told) or Fact[Family | None](None, "nothing in the file tells a family", "certain")
    family = fact.value
    done = {name: finish(reading, file, family) for name, reading in readings.items()}

    ema, ema_names = _ema(file, readings, averages)
    own = plan(family.leftovers if family is not None else (), rest)
    leftovers = {**common.dropped, **own.dropped}
    unknown = {*own.unnamed, *averages} - set(ema_names.values())
    for reading in readings.values():
        leftovers.update(reading.plan.dropped)
        unknown.update(() if reading.trouble else reading.surplus)
    leftovers.update({average: f"the average (EMA) of {name}" for name, average in ema_names.items()})

    found = Found(
        path=file.path,
        kind=_kind(file, readings),
        family=fact,
        variant=_variant(readings.get("unet"), family),
        components={name: result for name, result in done.items() if isinstance(result, Component)},
        missing=_missing(family, readings, done),
        leftovers=dict(sorted(leftovers.items())),
        unknown=tuple(sorted(unknown)),
        ema=ema if readings else None,
        ema_names=ema_names,
    )
    return _with_sampling(found, file, readings, told_prediction)


def _with_sampling(found: Found, file: ModelFile, readings: Mapping[str, Reading], told: str | None) -> Found:
    """`found` with what a model of its family needs to be sampled."""
    family = found.family.value
    if family is None:
        return found
    scale = Fact(family.latent_scale, f"that of {family.title}; no single file says it", found.family.sure)
    stated = config(file, readings["vae"]).get("scaling_factor") if "vae" in readings else None
    if isinstance(stated, float | int) and 0 < stated < 1000:
        scale = Fact(float(stated), "the autoencoder's config.json says scaling_factor", "certain")
    found = replace(found, latent_scale=scale)
    if "unet" not in readings:
        return found
    fact = predicts(file, family, found.variant.value, readings["unet"], told)
    return replace(
        found,
        prediction=fact,
        zero_snr=zero_snr(file),
        levels=levels(file, family),
        size=_size(file, family, fact.value, readings),
    )


def _kind(file: ModelFile, readings: Mapping[str, Reading]) -> Fact[str]:
    what = ", ".join(readings)
    if file.format == "diffusers folder" and readings:
        return Fact("diffusers folder", f"a folder of {what}", "certain")
    if len(readings) > 1:
        return Fact("checkpoint", f"{what} in one file", "certain")
    if len(readings) == 1:
        kind = "text encoder" if what.startswith("text_encoder") else what.replace("_", " ")
        return Fact(kind, f"the file holds nothing but a {kind}", "certain")
    some = printable(min(file.tensors, default="none"))
    nothing = Fact("unknown", f"none of its {len(file)} names is known; the first is {some}", "certain")
    return image_tower(file.tensors) or nothing


def _variant(unet: Reading | None, family: Family | None) -> Fact[str | None]:
    if unet is None or family is None:
        return Fact(None, "there is no U-Net to tell it", "certain")
    if unet.video:
        return Fact(None, "svd and svd_xt have the same tensors; the number of frames is not in the file", "certain")
    if not isinstance(unet.spec, UNetSpec):
        return Fact(None, f"the U-Net cannot be read: {unet.trouble}", "certain")
    channels = unet.spec.in_channels
    known = family.variants.get(channels)
    if known == "base" and unet.spec.vector_channels and family.unet and not family.unet.vector_channels:
        return Fact("unclip", "the U-Net takes an image embedding as its extra vector", "likely")
    evidence = f"the U-Net's first convolution takes {channels} channels"
    return Fact(known or f"{channels} channels", evidence, "certain" if known else "guess")


def _missing(
    family: Family | None, readings: Mapping[str, Reading], done: Mapping[str, Component | str]
) -> dict[str, str]:
    """What a model of the family needs and this file has not, or has in no usable state."""
    missing = {name: result for name, result in done.items() if isinstance(result, str)}
    for place in family.places if family is not None else ():
        if place.component not in readings:
            missing[place.component] = f"not in the file; single files keep it under {place.prefix}"
    return missing


def _ema(file: ModelFile, readings: Mapping[str, Reading], averages: Set[str]) -> tuple[Fact[str], dict[str, str]]:
    """Whether averaged weights stand beside the plain ones, and their names by those of the network.

    Those names have every dot removed, which cannot be undone: so the known names are squeezed in the same way. The
    average is of what was trained: the U-Net, or in a file of an autoencoder alone that.
    """
    trained, stem = readings.get("unet"), "diffusion_model."
    if trained is None:
        trained, stem = readings.get("vae"), ""
    names = list(trained.plan.origins) if trained is not None else []
    squeezed = {name: "model_ema." + (stem + name).replace(".", "") for name in names}
    found = {name: average for name, average in squeezed.items() if average in averages}
    if found:
        share = "both" if len(found) == len(names) else "both, in part"
        return Fact(share, f"{len(found)} of {len(names)} tensors have an average beside them", "certain"), found
    if "model_ema.decay" in file or "model_ema.num_updates" in file:
        evidence = "only the average's counters are left, so the plain weights are the averages"
        return Fact("counters", evidence, "likely"), found
    return Fact("none", "no tensor is called model_ema", "certain"), found


def _size(file: ModelFile, family: Family, prediction: str, readings: Mapping[str, Reading]) -> Fact[tuple[int, int]]:
    """The size in pixels that the model was trained to paint, (width, height)."""
    stated = re.fullmatch(r"\s*(\d{2,5})\s*[x×]\s*(\d{2,5})\s*", file.metadata.get("modelspec.resolution", ""))
    if stated is not None:
        return Fact((int(stated[1]), int(stated[2])), "the metadata says modelspec.resolution", "certain")
    cells = config(file, readings["unet"]).get("sample_size")
    vae = readings["vae"].spec if "vae" in readings else None
    if isinstance(cells, int) and 0 < cells <= 4096 and isinstance(vae, VaeSpec):
        side = cells * vae.factor
        return Fact((side, side), f"the U-Net's config.json says a sample_size of {cells}", "certain")
    if family.name == "sd2" and prediction == "v":
        return Fact((768, 768), "models of Stable Diffusion 2 that predict velocity were trained at 768", "likely")
    return Fact(family.size, f"the size of {family.title}", "likely")


def _adapter(file: ModelFile, names: AdapterNames, told: Fact[Family | None] | None) -> Found:
    where = ", ".join(f"{count} in {component}" for component, count in names.modules.items())
    if names.block_names is not None:
        where += f", U-Net blocks by the {names.block_names} numbers"
    if names.embeddings:
        where += f", with {len(names.embeddings)} embeddings packed along"
    kind = Fact(names.kind, f"the suffixes are those of {names.kind}; it changes modules: {where}", "certain")
    family = _by_width(file, names.context_dim or 0, f"its U-Net attends to prompts {names.context_dim} wide", told)
    if family.value is None and "text_encoder_2" in names.modules:
        family = Fact(family_named("sdxl"), "it changes two text encoders (lora_te1, lora_te2)", "likely")
    return _small(file, kind, names.base, family, names.unnamed)


def _embedding(file: ModelFile, names: EmbeddingNames, told: Fact[Family | None] | None) -> Found:
    kind = Fact("embedding", f"the names are those of the form {names.format}; vectors: {names.vectors}", "likely")
    widths = " and ".join(map(str, names.widths.values()))
    family = _by_width(file, sum(names.widths.values()), f"its vectors are {widths} wide", told)
    return _small(file, kind, names.format, family)


def _hypernetwork(file: ModelFile, widths: tuple[int, ...], told: Fact[Family | None] | None) -> Found:
    kind = Fact("hypernetwork", f"pairs of small networks for contexts {', '.join(map(str, widths))} wide", "certain")
    line = next((width for width in widths if width in (768, 1024)), 0)
    return _small(file, kind, None, _by_width(file, line, f"it acts on prompts {line} wide", told))


def _by_width(file: ModelFile, width: int, evidence: str, told: Fact[Family | None] | None) -> Fact[Family | None]:
    hints = [Fact(family_of_width(width), evidence, "likely")] if family_of_width(width) is not None else []
    return settle([*hints, *metadata_hints(file.metadata)], told) or Fact(None, "its widths are no family's", "certain")


def _small(
    file: ModelFile,
    kind: Fact[str],
    form: str | None,
    family: Fact[Family | None],
    unknown: tuple[str, ...] = (),
) -> Found:
    variant = Fact(form, kind.evidence, kind.sure)
    return Found(path=file.path, kind=kind, family=family, variant=variant, unknown=unknown)
