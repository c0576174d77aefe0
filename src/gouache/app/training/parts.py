"""Which parts of a model a run trains, in which form and at which rates, from its settings."""

from __future__ import annotations

from collections.abc import Sequence

from gouache.errors import RequestError
from gouache.model.inpainting import CHANNELS
from gouache.training.run_settings import AdapterSettings, RunSettings
from gouache.training.targets.dropout import Rates
from gouache.training.targets.options import FORMS, RANKED, SCALED, AdapterOptions
from gouache.training.targets.weights import WeightsOptions


def options_of(settings: RunSettings, encoders: Sequence[str]) -> AdapterOptions | WeightsOptions:
    """The options of the target; `encoders` are the names of the model's text encoders.

    Raises RequestError for settings that do not go together.
    """
    chosen, parts = settings.adapter, settings.parts
    _check_effects(settings)
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


def _check_effects(settings: RunSettings) -> None:
    """Raises RequestError for a setting that would have no effect, or a wrong one, on what is trained."""
    adapter, usual = settings.adapter, AdapterSettings()
    changed = [name for name in AdapterSettings.model_fields if getattr(adapter, name) != getattr(usual, name)]
    for name in changed:
        if adapter.form == "none" and name != "form":
            raise RequestError(
                f"adapter.{name}", "has no effect on trained weights (adapter.form = none); leave it out, or set a form"
            )
        forms = _FORMS_OF.get(name)
        if forms is not None and FORMS[adapter.form].parts not in forms:
            raise RequestError(
                f"adapter.{name}", f"has no effect on {adapter.form}; it applies to {', '.join(forms)}; leave it out"
            )
    if adapter.form != "none" and settings.model.weights != "last":
        raise RequestError(
            "model.weights",
            f"{settings.model.weights} is for trained weights (adapter.form = none); of a model with averages (EMA) "
            "write a file of them alone with `gouache prune`, and train the adapter on that",
        )
