"""Which parts of a model a run trains, in which form and at which rates, from its settings."""

from __future__ import annotations

from collections.abc import Sequence

from gouache.errors import RequestError
from gouache.model.inpainting import CHANNELS
from gouache.training.run_settings import RunSettings
from gouache.training.targets.dropout import Rates
from gouache.training.targets.options import AdapterOptions
from gouache.training.targets.weights import WeightsOptions


def options_of(settings: RunSettings, encoders: Sequence[str]) -> AdapterOptions | WeightsOptions:
    """The options of the target; `encoders` are the names of the model's text encoders.

    Raises RequestError for settings that do not go together.
    """
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
    )
