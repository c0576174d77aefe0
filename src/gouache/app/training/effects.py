"""Which settings have an effect on what a run trains: those that have none are refused, not passed over."""

from __future__ import annotations

from collections.abc import Mapping

from gouache.errors import RequestError
from gouache.training.run_settings import RunSettings
from gouache.training.settings_tables import PretrainSettings, Table
from gouache.training.targets.options import FORMS, RANKED, SCALED

Effects = Mapping[str, tuple[str, ...]]
"""Tables, and the settings in them that have an effect; of tables that are not here all have."""

_OF_MODEL: Effects = {"embedding": (), "hypernetwork": (), "pretrain": (), "slider": ()}
_OF_PRETRAINING: Effects = {"embedding": (), "hypernetwork": (), "slider": (), "adapter": (), "parts": ()}
_EFFECTS: Mapping[str, Effects] = {
    "model": _OF_MODEL,
    "adapter": {"hypernetwork": (), "pretrain": (), "slider": ()},
    "embedding": {"adapter": ("start",), "parts": (), "hypernetwork": (), "pretrain": (), "slider": ()},
    "hypernetwork": {"adapter": ("start",), "parts": (), "embedding": (), "pretrain": (), "slider": ()},
    "pretrain": _OF_PRETRAINING,
    "pretrain on pictures": {
        **_OF_PRETRAINING,
        "loss": (),
        "model": ("name", "sha256", "weights", "vae", "family", "resume"),
    },
    "slider": {
        "data": ("cache", "fixed"),
        "embedding": (),
        "hypernetwork": (),
        "pretrain": (),
        "parts": (),
        "loss": ("weighting", "gamma"),
        "validation": ("timesteps", "probe"),
    },
}
"""By the kind of result, or the mode."""
_FORMS_OF = {"alpha": SCALED, "conv_alpha": SCALED, "alphas": SCALED, "rank": RANKED, "conv_rank": RANKED}
"""Settings of [adapter] and the forms that have them; those that `AdapterOptions` itself checks are not listed."""
_OF_AUTOENCODERS = ("kl", "ssim", "perceptual", "adversarial", "adversarial_start")


def check(settings: RunSettings) -> None:
    """Raises RequestError for a setting that would have no effect, or a wrong one, on what is trained."""
    result, mode = settings.result, settings.mode
    on_pictures = mode == "pretrain" and settings.pretrain.part != "unet"
    kind = "pretrain on pictures" if on_pictures else mode if mode in ("pretrain", "slider") else result
    what = "trained weights" if kind == "model" else f"the mode {mode}"
    if on_pictures:
        what += f" of the part {settings.pretrain.part}"
    for table, known in _EFFECTS[kind].items():
        if names := [name for name in changed(getattr(settings, table)) if name not in known]:
            raise RequestError(f"{table}.{names[0]}", f"has no effect on {what}; leave it out")
    if mode == "pretrain":
        _check_pretraining(settings.pretrain)
    elif result in ("model", "adapter"):
        _check_adapter(settings)


def changed(table: Table) -> list[str]:
    """The keys of a table that differ from the usual values."""
    usual = type(table)()
    return [name for name in type(table).model_fields if getattr(table, name) != getattr(usual, name)]


def _check_adapter(settings: RunSettings) -> None:
    adapter = settings.adapter
    for name in changed(adapter):
        if adapter.form == "none" and name != "form":
            raise RequestError(
                f"adapter.{name}", "has no effect on trained weights (adapter.form = none); leave it out, or set a form"
            )
        forms = _FORMS_OF.get(name)
        if forms is not None and FORMS[adapter.form].parts not in forms:
            raise RequestError(
                f"adapter.{name}", f"has no effect on {adapter.form}; it applies to {', '.join(forms)}; leave it out"
            )
    if not settings.embedding.vectors and (
        names := [each for each in changed(settings.embedding) if each != "vectors"]
    ):
        raise RequestError(f"embedding.{names[0]}", "has no effect without embedding.vectors; set that too")
    if settings.result != "model" and settings.model.weights != "last":
        raise RequestError(
            "model.weights",
            f"{settings.model.weights} is for trained weights (adapter.form = none); of a model with averages (EMA) "
            "write a file of them alone with `gouache prune`, and train the adapter on that",
        )


def _check_pretraining(chosen: PretrainSettings) -> None:
    names = [name for name in changed(chosen) if name in _OF_AUTOENCODERS]
    if chosen.part != "vae" and names:
        raise RequestError(f"pretrain.{names[0]}", f"has no effect on the part {chosen.part}; it is for vae")
    if chosen.adversarial_start and not chosen.adversarial:
        raise RequestError("pretrain.adversarial_start", "has no effect without pretrain.adversarial; set that too")
