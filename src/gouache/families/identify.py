"""ModelFile -> Found: identifies a file by its names, shapes and metadata, with evidence for each statement.

No weights are read, except one small tensor where nothing else shows the prediction of an SD2 model. Values that the
caller sets override the file's; contradicting hints are listed in the evidence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import replace

from gouache.errors import RequestError, printable
from gouache.families.averages import as_weights, averages_only, with_averages
from gouache.families.catalog import family_named
from gouache.families.components import Candidate, config, finish, prefix_of, read_components
from gouache.families.family import COMMON_LEFTOVERS, Family
from gouache.families.found import Component, Fact, Found, strongest
from gouache.families.match import family_hints, family_of_width, metadata_hints
from gouache.families.others import image_encoder_kind, other_kind
from gouache.families.prediction import PREDICTIONS, levels, zero_snr
from gouache.families.prediction import prediction as predicts
from gouache.files.record import ModelFile
from gouache.layouts.adapters import AdapterNames, EmbeddingNames, read_adapter, read_embedding, read_hypernetwork
from gouache.layouts.rules import plan
from gouache.nn.spec import UNetSpec, VaeSpec
from gouache.wording import plural


def identify(file: ModelFile, *, prediction: str | None = None, family: str | None = None) -> Found:
    """What `file` is. `prediction` ("eps", "v", "edm") and `family` (a name of the catalog) override what it shows.

    Raises RequestError for an unknown override. A file that cannot be identified has the kind "unknown"; that is not
    an error.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise RequestError("prediction", f"{prediction!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
    override: Fact[Family | None] | None = None
    if family is not None:
        override = Fact[Family | None](family_named(family), "set by the caller", "override")
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if (adapter := read_adapter(shapes)) is not None:
        return _adapter(file, adapter, override)
    if (widths := read_hypernetwork(shapes)) is not None:
        return _hypernetwork(file, widths, override)
    if (embedding := read_embedding(shapes, file.extra)) is not None:
        return _embedding(file, embedding, override)
    if (other := other_kind(shapes)) is not None:
        width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
        return _simple_found(file, other, None, _by_width(file, width, _context_width(width), override))
    if not (averages := averages_only(file)):
        return _model(file, prediction, override)
    return with_averages(_model(as_weights(file), prediction, override), averages)


def _model(file: ModelFile, prediction_override: str | None, override: Fact[Family | None] | None) -> Found:
    common = plan(COMMON_LEFTOVERS, file.tensors)
    averages = {name for name in common.unnamed if name.startswith("model_ema.")}
    candidates, rest = read_components(file, (name for name in common.unnamed if name not in averages))
    hints = family_hints(candidates, file.metadata, file.path.name)
    nothing = Fact[Family | None](None, "nothing in the file indicates a family", "certain")
    fact = strongest(hints, override) or nothing
    family = fact.value
    done = {name: finish(candidate, file, family) for name, candidate in candidates.items()}

    ema, ema_names = _ema(file, candidates, averages)
    own = plan(family.leftovers if family is not None else (), rest)
    leftovers = {**common.dropped, **own.dropped}
    unknown = {*own.unnamed, *averages} - set(ema_names.values())
    for candidate in candidates.values():
        leftovers.update(candidate.plan.dropped)
        unknown.update(() if candidate.problem else candidate.unexpected)
    leftovers.update({average: f"the average (EMA) of {name}" for name, average in ema_names.items()})
    if candidates:
        empty = {name for name in unknown if not file.tensors[name].elements}
        leftovers.update(dict.fromkeys(empty, "an empty tensor"))
        unknown -= empty

    missing = _missing(family, candidates, done)
    found = Found(
        path=file.path,
        kind=_kind(file, candidates),
        family=fact,
        variant=_variant(candidates.get("unet"), family),
        components={name: result for name, result in done.items() if isinstance(result, Component)},
        missing=missing,
        absent=frozenset(missing) - frozenset(candidates),
        leftovers=dict(sorted(leftovers.items())),
        unknown=tuple(sorted(unknown)),
        outside=frozenset(name for name in unknown if not prefix_of(name)),
        ema=ema if candidates else None,
        ema_names=ema_names,
    )
    return _with_sampling(found, file, candidates, prediction_override)


def _with_sampling(
    found: Found, file: ModelFile, candidates: Mapping[str, Candidate], prediction_override: str | None
) -> Found:
    """`found` with the facts that sampling from a model of its family needs."""
    family = found.family.value
    if family is None:
        return found
    scale = Fact(
        family.latent_scale, f"the value of {family.title}; single files do not store it", found.family.confidence
    )
    stated = config(file, candidates["vae"]).get("scaling_factor") if "vae" in candidates else None
    if isinstance(stated, float | int) and 0 < stated < 1000:
        scale = Fact(float(stated), "the autoencoder's config.json states scaling_factor", "certain")
    found = replace(found, latent_scale=scale)
    if "unet" not in candidates:
        return found
    fact = predicts(file, family, found.variant.value, candidates["unet"], prediction_override)
    return replace(
        found,
        prediction=fact,
        zero_snr=zero_snr(file),
        levels=levels(file, family),
        size=_size(file, family, fact.value, candidates),
    )


def _kind(file: ModelFile, candidates: Mapping[str, Candidate]) -> Fact[str]:
    what = ", ".join(candidates)
    if file.format == "diffusers folder" and candidates:
        return Fact("diffusers folder", f"a folder with {what}", "certain")
    if len(candidates) > 1:
        return Fact("checkpoint", f"{what} in one file", "certain")
    if len(candidates) == 1:
        kind = "text encoder" if what.startswith("text_encoder") else what.replace("_", " ")
        return Fact(kind, f"the file contains only the {kind}", "certain")
    evidence = "the file has no tensors"
    if file.tensors:
        evidence = f"no tensor name is known ({len(file)} in all, the first is {printable(min(file.tensors))})"
    return image_encoder_kind(file.tensors) or Fact("unknown", evidence, "certain")


def _variant(unet: Candidate | None, family: Family | None) -> Fact[str | None]:
    if unet is None or family is None:
        return Fact(None, "the file has no U-Net, which would show it", "certain")
    if unet.video:
        return Fact(None, "svd and svd_xt have the same tensors; the number of frames is not in the file", "certain")
    if not isinstance(unet.spec, UNetSpec):
        return Fact(None, f"the U-Net cannot be read: {unet.problem}", "certain")
    channels = unet.spec.in_channels
    known = family.variants.get(channels)
    if known == "base" and unet.spec.vector_channels and family.unet and not family.unet.vector_channels:
        return Fact("unclip", "the U-Net has an image embedding as its extra vector", "likely")
    evidence = f"the U-Net's first convolution has {channels} input channels"
    return Fact(known or f"{channels} channels", evidence, "certain" if known else "guess")


def _missing(
    family: Family | None, candidates: Mapping[str, Candidate], done: Mapping[str, Component | str]
) -> dict[str, str]:
    """Components that a model of the family needs and that are absent or unusable in this file -> what is wrong."""
    missing = {name: result for name, result in done.items() if isinstance(result, str)}
    for location in family.locations if family is not None else ():
        if location.component not in candidates:
            missing[location.component] = f"not in the file; single files keep it under {location.prefix}"
    return missing


def _ema(file: ModelFile, candidates: Mapping[str, Candidate], averages: Set[str]) -> tuple[Fact[str], dict[str, str]]:
    """Whether the file has averaged (EMA) weights besides the plain ones, and {network's tensor name: average's name}.

    The averages' names have every dot removed, which cannot be undone, so the known names are changed in the same way.
    The average is of the trained network: the U-Net, or the autoencoder if the file has no U-Net.
    """
    trained, stem = candidates.get("unet"), "diffusion_model."
    if trained is None:
        trained, stem = candidates.get("vae"), ""
    names = list(trained.plan.origins) if trained is not None else []
    without_dots = {name: "model_ema." + (stem + name).replace(".", "") for name in names}
    found = {name: average for name, average in without_dots.items() if average in averages}
    if found:
        share = "both" if len(found) == len(names) else "both, in part"
        return Fact(share, f"{len(found)} of {len(names)} tensors also have an average", "certain"), found
    if "model_ema.decay" in file or "model_ema.num_updates" in file:
        evidence = "only the counters of the average are left, so the plain weights are the averages"
        return Fact("counters", evidence, "likely"), found
    return Fact("none", "no tensor name begins with model_ema", "certain"), found


def _size(
    file: ModelFile, family: Family, prediction: str, candidates: Mapping[str, Candidate]
) -> Fact[tuple[int, int]]:
    """The image size that the model was trained on: (width, height) in pixels."""
    stated = re.fullmatch(r"\s*(\d{2,5})\s*[x×]\s*(\d{2,5})\s*", file.metadata.get("modelspec.resolution", ""))
    if stated is not None:
        return Fact((int(stated[1]), int(stated[2])), "the metadata states modelspec.resolution", "certain")
    cells = config(file, candidates["unet"]).get("sample_size")
    vae = candidates["vae"].spec if "vae" in candidates else None
    if isinstance(cells, int) and 0 < cells <= 4096 and isinstance(vae, VaeSpec):
        side = cells * vae.factor
        return Fact((side, side), f"the U-Net's config.json states a sample_size of {cells}", "certain")
    if family.name == "sd2" and prediction == "v":
        return Fact((768, 768), "v-prediction models of Stable Diffusion 2 were trained at 768", "likely")
    return Fact(family.size, f"the size of {family.title}", "likely")


def _adapter(file: ModelFile, names: AdapterNames, override: Fact[Family | None] | None) -> Found:
    where = ", ".join(f"{count} in {component}" for component, count in names.modules.items())
    if names.block_names is not None:
        where += f", U-Net blocks in {names.block_names} numbering"
    if names.embeddings:
        words = ", ".join(printable(word, 60) for word in names.embeddings)
        where += f", with {plural(len(names.embeddings), 'bundled embedding')}: {words}"
    kind = Fact(names.kind, f"the suffixes are those of {names.kind}; it changes modules: {where}", "certain")
    family = _by_width(file, names.context_dim or 0, _context_width(names.context_dim), override)
    if family.value is None and "text_encoder_2" in names.modules:
        family = Fact(family_named("sdxl"), "it changes two text encoders (lora_te1, lora_te2)", "likely")
    return _simple_found(file, kind, names.base, family, names.unnamed)


def _embedding(file: ModelFile, names: EmbeddingNames, override: Fact[Family | None] | None) -> Found:
    kind = Fact("embedding", f"the names are those of the {names.format} format; vectors: {names.vectors}", "likely")
    widths = " + ".join(map(str, names.widths.values()))
    family = _by_width(file, sum(names.widths.values()), f"vector width {widths}", override)
    return _simple_found(file, kind, names.format, family)


def _hypernetwork(file: ModelFile, widths: tuple[int, ...], override: Fact[Family | None] | None) -> Found:
    listed = ", ".join(map(str, widths))
    kind = Fact("hypernetwork", f"pairs of small networks for the context widths {listed}", "certain")
    width = next((width for width in widths if width in (768, 1024)), 0)
    what = f"context width {width or listed}" if width or len(widths) == 1 else f"context widths {listed}"
    return _simple_found(file, kind, None, _by_width(file, width, what, override))


def _by_width(file: ModelFile, width: int, what: str, override: Fact[Family | None] | None) -> Fact[Family | None]:
    """The family with the context width `width`. `what` describes the width ("context width 768"), "" if unknown."""
    family = family_of_width(width)
    hints = [Fact(family, what, "likely")] if family is not None else []
    verb = "match" if what.startswith("context widths") else "matches"
    reason = f"{what} {verb} no released model" if what else "no tensor shows a context width"
    nothing = Fact[Family | None](None, f"not recognised ({reason})", "certain")
    return strongest([*hints, *metadata_hints(file.metadata)], override) or nothing


def _context_width(width: int | None) -> str:
    return f"context width {width}" if width else ""


def _simple_found(
    file: ModelFile,
    kind: Fact[str],
    form: str | None,
    family: Fact[Family | None],
    unknown: tuple[str, ...] = (),
) -> Found:
    variant = Fact(form, kind.evidence, kind.confidence)
    return Found(path=file.path, kind=kind, family=family, variant=variant, unknown=unknown)
