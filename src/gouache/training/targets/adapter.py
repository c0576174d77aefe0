"""An adapter as the target of a run: its parts are parameters of live patches, so it acts as it will when painting."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gouache.adapters.parameters import ParameterAdapter
from gouache.adapters.read import AdapterFile, read_lora
from gouache.adapters.strength import Strength
from gouache.errors import ModelError, RequestError, printable
from gouache.files.record import ModelFile
from gouache.layouts.modules import Module, module_names
from gouache.model.model import Model
from gouache.nn import products
from gouache.training.objective import Group, Json
from gouache.training.targets.dropout import ModuleDropout, module_generator
from gouache.training.targets.export import (
    FORMS_OF_MODELS,
    AdapterParts,
    Averages,
    adapter_metadata,
    export_adapter,
    export_model,
)  # fmt: skip
from gouache.training.targets.initial import NUMBERS, initial_parts
from gouache.training.targets.options import AdapterOptions, choose, rates_of
from gouache.wording import plural

NETWORK = "adapter"  # precedes the names of parts in checkpoints


class AdapterTarget:
    """The parts of an adapter on `model`, which keeps its own weights; it is attached until `detach`.

    With `start`, an adapter file, its modules and parts are trained, from its values; of `options` then only those
    apply that are not about forms, modules and ranks. Raises RequestError for options that do not fit the model,
    ModelError for a file that does not.
    """

    keeps_weights = True

    def __init__(self, model: Model, options: AdapterOptions, *, seed: int, start: ModelFile | None = None) -> None:
        self.model, self.options = model, options
        self.notes: list[str] = []
        networks: dict[str, nn.Module] = {"unet": model.unet, **model.text_encoders}
        parts = self._new(seed, networks) if start is None else self._of_file(start)
        self._rates = rates_of(options, parts, networks)
        self._dropouts = (
            {}
            if options.dropouts.none
            else {module: ModuleDropout(options.dropouts, seed, module, tensors) for module, tensors in parts.items()}
        )
        self.adapter = ParameterAdapter("the trained adapter", parts, self._dropouts)
        self._attached = model.adapters.attach(self.adapter, Strength(), how="live")
        self._disable = [products.enable(network) for network in networks.values()]
        if wrong := self._attached.wrong_shape:
            self.detach()
            module, why = next(iter(wrong.items()))
            raise ModelError(f"the adapter does not fit {module}: {why}")

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {NETWORK: self.adapter}

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that it changes."""
        return tuple(self.adapter.target_modules)

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        return {"unet": self.model.unet, **(self.model.text_encoders if self.trains_text else {})}

    @property
    def trains_text(self) -> bool:
        return any(part != "unet" for part, _ in self.modules)

    def groups(self) -> list[Group]:
        """By part, key of `rates`, side of LoRA+ and decay, even with equal rates: so rates may change on resume."""
        by_kind: dict[tuple[str, str, bool, bool], tuple[dict[str, nn.Parameter], float]] = {}
        for module in self.modules:
            for part, key in self.adapter.keys_of(module).items():
                parameter = getattr(self.adapter, key)
                if isinstance(parameter, nn.Parameter):
                    rates_key, rate = self._rates[module]
                    second = part == "lora_up.weight"
                    # Every part is zero without a change, except magnitudes: decay would shrink the weights themselves.
                    decay = part not in ("dora_scale", "dora_rows")
                    kind = (module[0], rates_key, second, decay)
                    rate *= self.options.loraplus if second else 1.0
                    by_kind.setdefault(kind, ({}, rate))[0][f"{NETWORK}.{key}"] = parameter
        return [Group(parameters, rate, kind[-1]) for kind, (parameters, rate) in by_kind.items()]

    def config(self) -> Mapping[str, Json]:
        options = self.options
        layout = "\n".join(
            f"{key} {list(tensor.shape)} {'' if isinstance(tensor, nn.Parameter) else tensor.tolist()}"
            for key, tensor in sorted(self.adapter.state_dict(keep_vars=True).items())
        )
        return {
            "target": "adapter",
            "form": options.form,
            "rank": options.rank,
            "alpha": options.alpha,
            "parts": list(dict.fromkeys(part for part, _ in self.modules)),
            "modules": len(self.modules),
            "layout": hashlib.sha256(layout.encode()).hexdigest()[:16],
        }

    def begin_batch(self, number: int) -> None:
        for dropout in self._dropouts.values():
            dropout.begin_batch(number)
        for module in self.modules if self.options.stop_after else ():
            stop = self.options.stop_after.get(module[0])
            for key in self.adapter.keys_of(module).values():
                if isinstance(part := getattr(self.adapter, key), nn.Parameter):
                    part.requires_grad_(stop is None or number < stop)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model as it is without the adapter, also where training began from the adapter of a file (`start`)."""
        hooks = self._attached.hooks.values()
        before = [hook.on for hook in hooks]
        for hook in hooks:
            hook.on = False
        try:
            yield
        finally:
            for hook, on in zip(hooks, before, strict=True):
                hook.on = on

    def set_strength(self, strength: float) -> None:
        """Act at so much of the trained strength (1, also negative) from now on, until it is set again."""
        self.model.adapters.change(self._attached, Strength(strength))

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
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapter with `weights`, or with a form of models the model with the adapter's changes in it.

        `names`: "kohya", for most programs; "diffusers", one file for its pipelines; "peft", a folder with a subfolder
        per part, each of which PEFT opens. `more` are further tensors of a file with kohya's names. Raises
        RequestError for a form or naming that the adapter does not have.
        """
        if form in FORMS_OF_MODELS:
            baked = self._baked(weights if averages is None else {**weights, **averages.weights})
            form = "pruned" if form == "pruned-emaonly" else form
            export_model(baked, self.model, path, form, metadata, None, dtype, overwrite=overwrite)
            return
        if form != "adapter":
            known = ", ".join(("adapter", *FORMS_OF_MODELS))
            raise RequestError("form", f"{printable(form, 40)!r} is not known; use {known}")
        parts: AdapterParts = {
            module: {
                part: weights.get(f"{NETWORK}.{key}", getattr(self.adapter, key)).detach().cpu()
                for part, key in self.adapter.keys_of(module).items()
            }
            for module in self.modules
        }
        described = adapter_metadata(self.model, self.options, parts, path.stem)
        export_adapter(
            parts, self.model, path, names, {**described, **metadata}, dtype or "fp32", more, overwrite=overwrite
        )

    def detach(self) -> None:
        """Leave the model as it was before; painting with the adapter needs the exported file then."""
        for disable in self._disable:
            disable()
        self.model.adapters.detach(self._attached)

    @torch.no_grad()
    def _baked(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The weights of the changed networks with the adapter's changes in them; the adapter has `weights` then."""
        for name, tensor in self.adapter.state_dict().items():
            tensor.copy_(weights.get(f"{NETWORK}.{name}", tensor))
        folded = self.model.adapters.attach(self.adapter, Strength(), how="folded")
        networks = {"unet": self.model.unet, **self.model.text_encoders}
        try:
            return {
                part: {name: tensor.detach().cpu().clone() for name, tensor in networks[part].state_dict().items()}
                for part in dict.fromkeys(part for part, _ in self.modules)
            }
        finally:
            self.model.adapters.detach(folded)

    def _new(self, seed: int, networks: Mapping[str, nn.Module]) -> dict[Module, dict[str, Tensor]]:
        return {
            module: initial_parts(
                module[1],
                networks[module[0]].get_submodule(module[1]),
                choice,
                self.options,
                module_generator(seed, module, 0),
            )
            for module, choice in choose(self.options, networks, self.model.text_recipe).items()
        }

    def _of_file(self, file: ModelFile) -> dict[Module, dict[str, Tensor]]:
        adapter = read_lora(file, module_names(self.model.specs))
        fitting, wrong = self.model.adapters.sort(adapter)
        modules = [module for module in fitting if module[0] in self.options.parts]
        name = printable(str(file.path))
        if not modules:
            raise ModelError(
                f"{name} changes no module of {', '.join(self.options.parts)} of this model; start from another adapter"
            )
        skipped = [*adapter.unmatched, *wrong, *(" ".join(each) for each in fitting if each not in modules)]
        if skipped:
            count = plural(len(skipped), "name")
            self.notes.append(f"{name}: {count} not trained, the first is {printable(skipped[0], 80)}")
        return {module: self._parts_of(adapter, module) for module in modules}

    def _parts_of(self, adapter: AdapterFile, module: Module) -> dict[str, Tensor]:
        """The parts of one module in a file, those to be trained on the model's device."""
        patch = adapter.patch(module)
        parts, (index, count) = dict(patch.parts), patch.share
        if count > 1:  # one LoRA for OpenCLIP's fused query, key and value becomes three
            if patch.form != "LoRA" or "lora_mid.weight" in parts or "diff_b" in parts:
                raise ModelError(f"{printable(adapter.name)}: {patch.form} on fused modules cannot be trained further")
            parts["lora_up.weight"] = parts["lora_up.weight"].chunk(count)[index].clone()
        whole_numbers = ("bias_indices", "bias_size")
        return {
            name: part if name in (*NUMBERS, *whole_numbers) else part.to(self.model.device).clone().requires_grad_()
            for name, part in parts.items()
        }
