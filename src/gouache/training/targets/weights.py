"""The weights of whole networks as the target of a run: the U-Net and, if asked, text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gouache.errors import ModelError, RequestError, printable
from gouache.model.model import Model
from gouache.training.objective import Group, Json, by_decay
from gouache.training.targets.export import FORMS_OF_MODELS, Averages, export_model
from gouache.training.targets.options import check_stops
from gouache.training.targets.widen import widen
from gouache.wording import plural

Start = Literal["last", "ema"]


@dataclass(frozen=True)
class WeightsOptions:
    """`parts` are the trained components (unet, text_encoder, text_encoder_2, vae), `rates` the factors of their
    learning rates (1 if absent), `stop_after` the number of batches after which a part is not trained any more.

    `start`: from the last weights of the file or from their averages (EMA). `in_channels`: the U-Net is given that many
    input channels (`targets.widen`); 0 keeps those it has. `keep_base`: keep the weights as they were before training,
    for the prior of the frozen model; they take memory unless they are mapped from the file.
    """

    parts: tuple[str, ...] = ("unet",)
    rates: Mapping[str, float] = field(default_factory=dict)
    stop_after: Mapping[str, int] = field(default_factory=dict)
    start: Start = "last"
    in_channels: int = 0
    keep_base: bool = False

    def __post_init__(self) -> None:
        if not self.parts:
            raise RequestError("parts", "names no component; use unet, text_encoder or text_encoder_2")
        if self.start not in ("last", "ema"):
            raise RequestError("start", f"{printable(str(self.start), 40)!r} is not known; use last or ema")
        for part, rate in self.rates.items():
            if part not in self.parts:
                raise RequestError("rates", f"{printable(part, 40)!r} is not trained; trained: {', '.join(self.parts)}")
            if not 0 <= rate < float("inf"):
                raise RequestError("rates", f"is {rate:g} for {part}; expected a number of 0 or more")
        if self.in_channels and "unet" not in self.parts:
            raise RequestError("in_channels", "needs the U-Net to be trained; add unet to parts")
        check_stops(self.stop_after, self.parts)

    @property
    def rate_factors(self) -> set[float]:
        """The factors of the learning rate of all parts."""
        return {self.rates.get(part, 1.0) for part in self.parts}


class WeightsTarget:
    """All weights of the trained parts of `model`, which are changed in place; the other networks are frozen.

    Raises RequestError for parts that the model does not have, ModelError if averages are requested that its file does
    not have.
    """

    keeps_weights = False

    def __init__(self, model: Model, options: WeightsOptions) -> None:
        self.model, self.options = model, options
        networks: dict[str, nn.Module] = {"unet": model.unet, **model.text_encoders, "vae": model.vae}
        if unknown := [part for part in options.parts if part not in networks]:
            raise RequestError(
                "parts", f"{printable(unknown[0], 40)!r} is not a part; the model has {', '.join(networks)}"
            )
        for network in networks.values():
            network.requires_grad_(False)
        self._networks = {part: networks[part] for part in options.parts}
        self.notes = [start_from(model, options.start)] if "unet" in options.parts else []
        if options.in_channels not in (0, model.unet.spec.in_channels):
            self.notes.append(widen(model, options.in_channels))
        self._base: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self._parameters():
                if options.keep_base:
                    self._base[name] = parameter.data
                parameter.data = parameter.data.clone()  # of memory that may be mapped from the file
                parameter.requires_grad_(True)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self._networks

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        return {"unet": self.model.unet, **self._networks}

    @property
    def trains_text(self) -> bool:
        return any(part.startswith("text_encoder") for part in self._networks)

    def groups(self) -> list[Group]:
        return [
            group
            for part, network in self._networks.items()
            for group in by_decay({part: network}, self.options.rates.get(part, 1.0))
            if group.parameters
        ]

    def config(self) -> Mapping[str, Json]:
        unet = self.model.unet.spec
        return {
            "target": "weights",
            "parts": list(self.options.parts),
            "start": self.options.start,
            "in_channels": unet.in_channels,
        }

    def begin_batch(self, number: int) -> None:
        for part, stop in self.options.stop_after.items():
            self._networks[part].requires_grad_(number < stop)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        if not self._base:
            raise RequestError(
                "keep_base", "is off, but the prior of the frozen model needs the weights before training"
            )
        trained = {name: parameter.data for name, parameter in self._parameters()}
        self._put(self._base)
        try:
            yield
        finally:
            self._put(trained)

    def export(
        self,
        weights: Mapping[str, Tensor],
        path: Path,
        *,
        form: str = "full",
        names: str = "original",
        metadata: Mapping[str, str],
        averages: Averages | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the model with `weights` (those that are missing are the present ones) in the names of its file.

        `form`: full, pruned or pruned-emaonly (`targets.export.export_model`). Raises RequestError for another form.
        """
        if form not in FORMS_OF_MODELS:
            raise RequestError(
                "form", f"{printable(form, 40)!r} is not a form of trained weights; use {', '.join(FORMS_OF_MODELS)}"
            )
        trained = {
            part: {
                name: weights.get(f"{part}.{name}", tensor).detach().cpu()
                for name, tensor in network.state_dict().items()
            }
            for part, network in self._networks.items()
        }
        export_model(trained, self.model, path, form, metadata, averages, dtype, overwrite=overwrite)

    def detach(self) -> None:
        """The model keeps the trained weights."""

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, network in self._networks.items():
            for name, parameter in network.named_parameters():
                yield f"{part}.{name}", parameter

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.data = weights[name]


def start_from(model: Model, start: Start) -> str:
    """Give the U-Net of `model` the weights to start from; returns one line that says which these are.

    Raises ModelError if the averages are requested and the file has none.
    """
    name, found = printable(model.file.path.name), model.found
    kind = found.ema.value if found.ema is not None else "none"
    if kind in ("only", "counters"):
        return f"{name} has no weights of the U-Net but averaged ones (EMA): training starts from them"
    if start == "last":
        if not found.ema_names:
            return f"training starts from the weights of {name}"
        return f"{name} has last and averaged weights (EMA): training starts from the last; start = ema is the other"
    if set(found.ema_names) != set(dict(model.unet.named_parameters())):
        raise ModelError(f"{name} has no complete averaged weights (EMA) to start from; use start = last")
    with torch.inference_mode(False), torch.no_grad():
        for key, parameter in model.unet.named_parameters():
            parameter.data = model.file.tensor(found.ema_names[key]).to(parameter.device, parameter.dtype, copy=True)
    return f"training starts from the averaged weights (EMA) of {name}, {plural(len(found.ema_names), 'tensor')}"
