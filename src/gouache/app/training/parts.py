"""What a run trains of a model, in which form and at which rates, from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gouache.adapters.embedding import Vectors, bundled_vectors, check_widths, vectors_of
from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import pretraining, sliders
from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.adapters import bundled
from gouache.model.inpainting import CHANNELS
from gouache.model.model import Model
from gouache.training.pretraining.target import AutoencoderTarget, PartTarget
from gouache.training.run_settings import RunSettings
from gouache.training.settings_tables import AdapterSettings, HypernetworkSettings, PretrainSettings, Table
from gouache.training.target import Target
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.dropout import Rates
from gouache.training.targets.embedding import EmbeddingOptions, EmbeddingTarget
from gouache.training.targets.hypernetwork import HypernetworkTarget
from gouache.training.targets.hypernetwork_layers import HypernetworkOptions
from gouache.training.targets.options import FORMS, RANKED, SCALED, AdapterOptions
from gouache.training.targets.pivotal import PivotalOptions, PivotalTarget
from gouache.training.targets.weights import WeightsOptions, WeightsTarget

Options = AdapterOptions | WeightsOptions | EmbeddingOptions | HypernetworkOptions | PivotalOptions


def make_target(settings: RunSettings, model: Model, user: Settings) -> Target:
    """What is trained, on `model`. Raises RequestError or ModelError if the model has no such parts."""
    options, seed = options_of(settings, list(model.text_encoders)), settings.train.seed
    if isinstance(options, WeightsOptions):
        if pretraining.trains_on_pictures(settings):
            return (AutoencoderTarget if options.parts == ("vae",) else PartTarget)(model, options)
        return WeightsTarget(model, options)
    start = start_file(settings, user)
    file = None if start is None else open_model(start)
    if isinstance(options, EmbeddingOptions):
        return EmbeddingTarget(model, options, start=None if file is None else _vectors(file, model))
    if isinstance(options, HypernetworkOptions):
        return HypernetworkTarget(model, options, seed=seed, start=file)
    if isinstance(options, PivotalOptions):
        adapter = AdapterTarget(model, options.adapter, seed=seed, start=file)
        word = options.embedding.word
        bundle = {} if file is None else bundled(file)
        vectors = _vectors(file, model, bundle[word]) if file is not None and word in bundle else None
        return PivotalTarget(adapter, EmbeddingTarget(model, options.embedding, start=vectors))
    return AdapterTarget(model, options, seed=seed, start=file)


def _vectors(file: ModelFile, model: Model, names: list[str] | None = None) -> Vectors:
    """The vectors in an embedding file, or of the bundled embedding with these `names` in a LoRA."""
    vectors = vectors_of(file) if names is None else bundled_vectors(file, names)
    check_widths(file, vectors, model.text_widths)
    return vectors


def start_file(settings: RunSettings, user: Settings) -> Path | None:
    """The file that training starts from, None without one. Raises RequestError if it is not found."""
    if not settings.adapter.start:
        return None
    kind = {"adapter": "lora"}.get(settings.result, settings.result)
    return names.resolve(settings.adapter.start, user, kind, "adapter.start")


def options_of(settings: RunSettings, encoders: Sequence[str]) -> Options:
    """The options of the target; `encoders` are the names of the model's text encoders.

    Raises RequestError for settings that do not go together.
    """
    _check_effects(settings)
    if settings.mode == "pretrain":
        return WeightsOptions((pretraining.PARTS[settings.pretrain.part],), start=settings.model.weights)
    if settings.result == "embedding":
        return _embedding(settings, max(1, settings.embedding.vectors))
    if settings.result == "hypernetwork":
        return _hypernetwork(settings.hypernetwork)
    trained = _networks(settings, encoders)
    if isinstance(trained, AdapterOptions) and settings.embedding.vectors:
        return PivotalOptions(trained, _embedding(settings, settings.embedding.vectors))
    return trained


def _embedding(settings: RunSettings, vectors: int) -> EmbeddingOptions:
    start = settings.embedding.init_word or settings.data.class_word or "*"
    return EmbeddingOptions(settings.data.trigger, vectors, start, settings.embedding.rate)


def _hypernetwork(chosen: HypernetworkSettings) -> HypernetworkOptions:
    return HypernetworkOptions(
        structure=tuple(chosen.structure),
        activation=chosen.activation,
        activate_output=chosen.activate_output,
        layer_norm=chosen.layer_norm,
        dropout=tuple(chosen.dropouts),
        use_dropout=chosen.use_dropout,
        last_layer_dropout=chosen.last_layer_dropout,
        initialisation=chosen.initialisation,
        widths=tuple(chosen.widths),
    )


def _networks(settings: RunSettings, encoders: Sequence[str]) -> AdapterOptions | WeightsOptions:
    chosen, parts = settings.adapter, settings.parts
    rates = dict.fromkeys(encoders, parts.text_rate)
    if parts.text_rate_2 is not None:
        rates |= dict.fromkeys(encoders[1:], parts.text_rate_2)
    rates = {name: rate for name, rate in rates.items() if rate and parts.text_encoder}
    trained = (*(["unet"] if parts.unet else []), *rates)
    if not trained:
        raise RequestError("parts", "names nothing to train; set unet or text_encoder to true")
    stops = dict.fromkeys(rates, parts.text_stop * settings.train.accumulate) if parts.text_stop else {}
    if chosen.form == "none":
        channels = CHANNELS if settings.model.inpainting else 0
        return WeightsOptions(trained, rates, stops, settings.model.weights, channels, settings.loss.prior == "model")
    return AdapterOptions(
        form=chosen.form,
        parts=trained,
        modules=chosen.modules or ("conv" if chosen.conv_rank else None),
        norms=chosen.modules == "all" and chosen.form == "full",
        rank=chosen.rank,
        alpha=chosen.alpha or None,
        conv_rank=chosen.conv_rank or None,
        conv_alpha=chosen.conv_alpha or None,
        ranks=chosen.ranks,
        alphas=chosen.alphas,
        rates={**rates, **chosen.rates},
        factor=chosen.factor,
        constraint=chosen.constraint,
        loraplus=chosen.plus_ratio,
        dropouts=Rates(chosen.module_dropout, chosen.rank_dropout, chosen.dropout),
        stop_after=stops,
        clip_skip=settings.model.clip_skip,
    )


_FORMS_OF = {"alpha": SCALED, "conv_alpha": SCALED, "alphas": SCALED, "rank": RANKED, "conv_rank": RANKED}
"""Settings of [adapter] and the forms that have them; those that `AdapterOptions` itself checks are not listed."""


_WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "model": ("embedding", "hypernetwork", "pretrain"),
    "adapter": ("hypernetwork", "pretrain"),
    "embedding": ("adapter", "parts", "hypernetwork", "pretrain"),
    "hypernetwork": ("adapter", "parts", "embedding", "pretrain"),
    "pretrain": ("adapter", "parts", "embedding", "hypernetwork"),
}
"""Tables of settings that do not concern a kind of result, or the mode pretrain."""


def _check_effects(settings: RunSettings) -> None:
    """Raises RequestError for a setting that would have no effect, or a wrong one, on what is trained."""
    sliders.check(settings)
    adapter, result = settings.adapter, settings.result
    pretrains = settings.mode == "pretrain"
    on_pictures = pretraining.trains_on_pictures(settings)
    for table in (*_WITHOUT_EFFECT["pretrain" if pretrains else result], *(["loss"] if on_pictures else [])):
        usual = RunSettings.model_fields[table].default
        if changed := [name for name in _changed(getattr(settings, table), usual) if name != "start"]:
            what = "trained weights" if result == "model" and not pretrains else f"the mode {settings.mode}"
            raise RequestError(f"{table}.{changed[0]}", f"has no effect on {what}; leave it out")
    if pretrains:
        _check_pretraining(settings.pretrain)
    if pretrains or result in ("embedding", "hypernetwork"):
        return
    for name in _changed(adapter, AdapterSettings()):
        if adapter.form == "none" and name != "form":
            raise RequestError(
                f"adapter.{name}", "has no effect on trained weights (adapter.form = none); leave it out, or set a form"
            )
        forms = _FORMS_OF.get(name)
        if forms is not None and FORMS[adapter.form].parts not in forms:
            raise RequestError(
                f"adapter.{name}", f"has no effect on {adapter.form}; it applies to {', '.join(forms)}; leave it out"
            )
    if result != "model" and settings.model.weights != "last":
        raise RequestError(
            "model.weights",
            f"{settings.model.weights} is for trained weights (adapter.form = none); of a model with averages (EMA) "
            "write a file of them alone with `gouache prune`, and train the adapter on that",
        )


_OF_AUTOENCODERS = ("kl", "ssim", "perceptual", "adversarial", "adversarial_start")


def _check_pretraining(chosen: PretrainSettings) -> None:
    changed = [name for name in _changed(chosen, PretrainSettings()) if name in _OF_AUTOENCODERS]
    if chosen.part != "vae" and changed:
        raise RequestError(f"pretrain.{changed[0]}", f"has no effect on the part {chosen.part}; it is for vae")
    if chosen.adversarial_start and not chosen.adversarial:
        raise RequestError("pretrain.adversarial_start", "has no effect without pretrain.adversarial; set that too")


def _changed(table: Table, usual: Table) -> list[str]:
    """The keys of a table that differ from the usual values."""
    return [name for name in type(table).model_fields if getattr(table, name) != getattr(usual, name)]
