"""What a run trains of a model, in which form and at which rates, from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gouache.adapters.embedding import Vectors, bundled_vectors, check_widths, vectors_of
from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import effects, pretraining, sliders
from gouache.errors import RequestError, printable
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.adapters import bundled
from gouache.model.inpainting import CHANNELS
from gouache.model.model import Model
from gouache.training.pretraining.target import AutoencoderTarget, PartTarget
from gouache.training.run_settings import RunSettings, toml
from gouache.training.settings_tables import HypernetworkSettings, Table
from gouache.training.target import Target
from gouache.training.targets import hypernetwork
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.dropout import Rates
from gouache.training.targets.embedding import EmbeddingOptions, EmbeddingTarget
from gouache.training.targets.hypernetwork import HypernetworkTarget
from gouache.training.targets.hypernetwork_layers import HypernetworkOptions
from gouache.training.targets.options import AdapterOptions
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


def check_start(settings: RunSettings, user: Settings) -> None:
    """Raises GouacheError for settings that differ from what the file that training starts from has."""
    start = start_file(settings, user)
    if start is None:
        return
    if settings.result == "hypernetwork":
        found = hypernetwork.options_of(open_model(start), HypernetworkOptions())
        values = {
            **vars(found),
            "structure": list(found.structure),
            "dropouts": list(found.dropouts),
            "use_dropout": any(found.dropouts),
            "last_layer_dropout": found.dropouts[-2] != 0,
        }
        _check_equal("hypernetwork", settings.hypernetwork, {**values, "widths": settings.hypernetwork.widths})
    elif settings.result == "embedding" or settings.embedding.vectors:
        file = open_model(start)
        bundle = bundled(file).get(settings.data.trigger) if settings.result == "adapter" else None
        if settings.result == "embedding" or bundle:
            vectors = vectors_of(file) if bundle is None else bundled_vectors(file, bundle)
            count = len(next(iter(vectors.values())))
            _check_equal("embedding", settings.embedding, {"vectors": count, "rate": settings.embedding.rate})


def _check_equal(name: str, table: Table, values: Mapping[str, Any]) -> None:
    for key in effects.changed(table):
        if key not in values:
            raise RequestError(f"{name}.{key}", "has no effect on vectors of a file (adapter.start); leave it out")
        if (given := getattr(table, key)) != values[key]:
            found, expected = printable(str(toml(given)), 60), printable(str(toml(values[key])), 60)
            raise RequestError(f"{name}.{key}", f"is {found}; expected {expected}, as the file of adapter.start has it")


def options_of(settings: RunSettings, encoders: Sequence[str]) -> Options:
    """The options of the target; `encoders` are the names of the model's text encoders.

    Raises RequestError for settings that do not go together.
    """
    sliders.check(settings)
    effects.check(settings)
    if settings.mode == "pretrain":
        return WeightsOptions((pretraining.PARTS[settings.pretrain.part],), start=settings.model.weights)
    if settings.result == "embedding":
        return _embedding(settings, 1 if settings.embedding.vectors is None else settings.embedding.vectors)
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
