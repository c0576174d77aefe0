"""A hypernetwork as the target of a run: pairs of small networks on the inputs of attention.

The model keeps its weights. While it is trained it acts through the hooks that act when painting with a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gouache.adapters.hypernetwork import HypernetworkHooks, keys_and_values
from gouache.errors import ModelError, RequestError, printable
from gouache.files.record import ModelFile
from gouache.layouts.adapters import read_hypernetwork
from gouache.model.model import Model
from gouache.nn import products
from gouache.training.objective import Group, Json, by_decay
from gouache.training.targets.dropout import module_generator
from gouache.training.targets.export import Averages
from gouache.training.targets.export_hypernetwork import Sides, export_hypernetwork
from gouache.training.targets.hypernetwork_layers import (
    INITIALISATIONS,
    NO_ACTIVATION,
    Draws,
    HypernetworkLayers,
    HypernetworkOptions,
    usual_dropouts,
)

NETWORK = "hypernetwork"  # precedes the names of weights in checkpoints
Pair = tuple[HypernetworkLayers, HypernetworkLayers]


class HypernetworkPairs(nn.Module):
    """{width: (for keys, for values)}; in `state_dict` they are called as in a file: `768.0.linear.0.weight`."""

    def __init__(self, pairs: Mapping[int, Pair]) -> None:
        super().__init__()
        self.pairs = dict(pairs)
        for width, pair in pairs.items():
            self.add_module(str(width), nn.ModuleList(pair))


class HypernetworkTarget:
    """A hypernetwork on the U-Net of `model`, which keeps its own weights; it is attached until `detach`.

    With `start`, a hypernetwork file, its networks are trained, from its values; of `options` then only `widths`
    applies. Raises RequestError for options that do not fit the model, ModelError for a file that does not.
    """

    keeps_weights = True

    def __init__(
        self, model: Model, options: HypernetworkOptions, *, seed: int, start: ModelFile | None = None
    ) -> None:
        self.model = model
        self.options = options if start is None else options_of(start, options)
        self.notes: list[str] = []
        self._draws = Draws(seed)
        widths = self._widths(start)
        pairs = {width: self._pair(width) for width in widths}
        for width, pair in pairs.items():
            for side, layers in enumerate(pair):
                if start is None:
                    generator = module_generator(seed, (NETWORK, f"{width}.{side}"), 0)
                    layers.initialise(self.options.initialisation, generator, model.device)
                else:
                    stored = tensors_of(start, width, side, layers)
                    layers.load_state_dict({key: each.to(model.device) for key, each in stored.items()}, assign=True)
        self.hypernetwork = HypernetworkPairs(pairs)
        self._hooks = HypernetworkHooks(model.unet, pairs, 1.0)
        self._hooks.attach()
        self._disable = products.enable(model.unet)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {NETWORK: self.hypernetwork}

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        return {"unet": self.model.unet}

    @property
    def trains_text(self) -> bool:
        """The input of attention changes, not the text encoder's output, which can be cached."""
        return False

    def groups(self) -> list[Group]:
        """Weights of linear layers decay; biases, layer norms and slopes do not."""
        return by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        options = self.options
        return {
            "target": "hypernetwork",
            "widths": list(self.hypernetwork.pairs),
            "structure": list(options.structure),
            "activation": options.activation,
            "activate_output": options.activate_output,
            "layer_norm": options.layer_norm,
            "dropout": list(options.dropouts),
            "initialisation": options.initialisation,
        }

    def begin_batch(self, number: int) -> None:
        self._draws.begin_batch(number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model as it is without the hypernetwork, also where training began from a file (`start`)."""
        before, self._hooks.strength = self._hooks.strength, 0.0
        try:
            yield
        finally:
            self._hooks.strength = before

    def export(
        self,
        weights: Mapping[str, Tensor],
        path: Path,
        *,
        form: str = "adapter",
        names: str = "kohya",
        metadata: Mapping[str, str],
        averages: Averages | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write A1111's .pt with `weights` (those that are missing are the present ones).

        Raises RequestError for a form or naming that hypernetworks do not have.
        """
        if form != "adapter":
            message = f"{printable(form, 40)!r} is for trained weights; this run trained a hypernetwork"
            raise RequestError("form", message)
        if names != "kohya":
            message = f"{printable(names, 40)!r} is for LoRAs; all programs read the same hypernetworks"
            raise RequestError("names", message)

        def side(width: int, number: int) -> dict[str, Tensor]:
            state = self.hypernetwork.pairs[width][number].state_dict()
            return {name: weights.get(f"{NETWORK}.{width}.{number}.{name}", each) for name, each in state.items()}

        pairs: dict[int, Sides] = {width: (side(width, 0), side(width, 1)) for width in self.hypernetwork.pairs}
        export_hypernetwork(pairs, self.options, path, metadata, overwrite=overwrite)

    def detach(self) -> None:
        """Leave the model as it was before; painting with the hypernetwork needs the exported file then."""
        self._disable()
        self._hooks.remove()

    def _pair(self, width: int) -> Pair:
        return (
            HypernetworkLayers(width, self.options, self._draws),
            HypernetworkLayers(width, self.options, self._draws),
        )

    def _widths(self, start: ModelFile | None) -> list[int]:
        """The widths that are trained, in increasing order."""
        of_model = widths_of(self.model)
        chosen, listed = set(self.options.widths) or set(of_model), ", ".join(map(str, of_model))
        if missing := sorted(chosen - set(of_model)):
            raise RequestError(
                "hypernetwork.widths", f"{missing[0]} is not a width of this model's attention; it has {listed}"
            )
        if start is None:
            return sorted(chosen)
        of_file = set(_widths_of_file(start))
        name = printable(str(start.path))
        if not of_file & chosen:
            in_file = ", ".join(map(str, sorted(of_file)))
            raise ModelError(f"{name} changes inputs of width {in_file}; this model's attention has {listed}")
        if skipped := sorted(of_file - chosen):
            self.notes.append(f"{name}: its networks for width {', '.join(map(str, skipped))} are not trained")
        return sorted(of_file & chosen)


def widths_of(model: Model) -> list[int]:
    """The widths of the inputs of attention's keys and values: SD1 has 320, 640, 1280, and 768 for prompts."""
    return sorted({module.in_features for _, module, _ in keys_and_values(model.unet)})


def _widths_of_file(file: ModelFile) -> tuple[int, ...]:
    widths = read_hypernetwork({name: info.shape for name, info in file.tensors.items()})
    if widths is None:
        raise ModelError(f"{printable(str(file.path))} is not a hypernetwork; start from one, or without a file")
    return widths


def options_of(file: ModelFile, options: HypernetworkOptions) -> HypernetworkOptions:
    """What A1111 reads in a file, with its defaults for missing values; `options` gives the widths.

    Raises ModelError for values that no hypernetwork has.
    """
    widths = _widths_of_file(file)
    extra, shown = file.extra, printable(str(file.path))
    structure = _numbers(file, "layer_structure") or (1, 2, 1)
    usual = usual_dropouts(len(structure), bool(extra.get("use_dropout")), bool(extra.get("last_layer_dropout")))
    initialisation = str(extra.get("weight_initialization"))
    try:
        found = HypernetworkOptions(
            structure=structure,
            activation=str(extra.get("activation_func") or NO_ACTIVATION).lower(),
            activate_output=bool(extra.get("activate_output", True)),
            layer_norm=bool(extra.get("is_layer_norm")),
            dropout=_numbers(file, "dropout_structure") or usual,
            initialisation=initialisation if initialisation in INITIALISATIONS else INITIALISATIONS[0],
            widths=options.widths,
        )
        for width in widths:
            found.sizes(width)
    except RequestError as error:
        raise ModelError(f"{shown} cannot be trained further: {error}") from None
    return found


def _numbers(file: ModelFile, name: str) -> tuple[float, ...]:
    """A list in the file; () if it is missing or None."""
    value: Any = file.extra.get(name)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise ModelError(f"{printable(str(file.path))}: its {name} is not a list of numbers, so it cannot be trained")
    return tuple(value)


def tensors_of(file: ModelFile, width: int, side: int, layers: HypernetworkLayers) -> dict[str, Tensor]:
    """The state dict of `layers` in a file, float32; also under NovelAI's names (linear1 and linear2).

    Raises ModelError if the file has other tensors.
    """
    shown, prefix = printable(str(file.path)), f"{width}.{side}."
    old = {"linear1.": "linear.0.", "linear2.": "linear.1."}
    found = {
        old.get(own[:8], own[:8]) + own[8:]: name
        for name in file
        if name.startswith(prefix)
        for own in [name.removeprefix(prefix)]
    }
    wanted = {name: tuple(each.shape) for name, each in layers.state_dict().items()}
    have = {own: tuple(file.tensors[name].shape) for own, name in found.items()}
    if wanted != have:
        wrong = next(own for own in [*wanted, *have] if wanted.get(own) != have.get(own))
        message = f"for inputs of width {width}, {printable(wrong, 60)} is {_shape(have.get(wrong))}"
        expected = f"expected {_shape(wanted.get(wrong))} by its layer_structure and the other values in it"
        raise ModelError(f"{shown} cannot be trained further: {message}; {expected}")
    tensors = {own: file.tensor(found[own]).float().clone() for own in wanted}
    # Those of an estimate of memory are of another type and have no values.
    if not all(bool(torch.isfinite(each).all()) for each in tensors.values() if type(each) is Tensor):
        raise ModelError(f"{shown} is damaged: it holds NaN or infinite numbers")
    return tensors


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
