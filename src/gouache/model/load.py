"""A file to a Model: identify, build on the meta device, map the weights in, count.

    ModelFile -> families.identify -> Found -> networks on meta -> files.assign -> Model

Nothing is loaded in part: a component that is missing or incomplete is named before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from gouache.diffusion.schedule import Schedule
from gouache.errors import ModelError, printable
from gouache.families.family import Family, NoiseLevels
from gouache.families.found import Component, Found
from gouache.families.identify import identify
from gouache.files.assign import assign
from gouache.files.record import ModelFile
from gouache.model.core import Core
from gouache.model.model import Model
from gouache.model.text import TextConditioner
from gouache.model.vae import load_vae
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from gouache.prompts.recipe import TextRecipe
from gouache.prompts.tokenizer import Tokenizer
from gouache.wording import plural

Network = TypeVar("Network", bound=nn.Module)
AnySpec = TypeVar("AnySpec", UNetSpec, TextSpec)
AnyModel = TypeVar("AnyModel", bound=Model)


def load(
    file: ModelFile,
    found: Found,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: tuple[ModelFile, Found] | None = None,
    model_class: type[AnyModel] = Model,
) -> AnyModel:
    """Load a whole model from `file`, which `found` describes (`families.identify`).

    `vae` is another file whose autoencoder replaces the model's own, which then may be missing. Raises ModelError if
    the file is not a whole model, or is of a family that cannot be painted with yet.
    """
    family = _family(found)
    needed = [place.component for place in family.locations if vae is None or place.component != "vae"]
    parts = {name: found.component(name) for name in needed}
    _no_unknowns(found)
    recipe = found.text_recipe
    if recipe is None or found.prediction is None or found.latent_scale is None:
        raise ModelError(f"{printable(str(file.path))}: {family.title} cannot be painted with yet; it can be inspected")

    if found.prediction.value == "edm":
        raise ModelError(f"{printable(str(file.path))} was trained in the EDM form, which cannot be painted with yet")
    names = [each.name for each in recipe.encoders]
    unet_spec = _spec(UNetSpec, parts["unet"], file)
    text_specs = {name: _spec(TextSpec, parts[name], file) for name in names}
    target = torch.device(device)
    autoencoder = load_vae(*(vae or (file, found)), target, dtype)
    _check_parts(found, unet_spec, autoencoder.spec.latent_channels, text_specs, recipe)

    unet = _network(UNet, unet_spec, parts["unet"], file, target, dtype)
    encoders = {name: _network(ClipText, text_specs[name], parts[name], file, target, dtype) for name in names}
    core = Core(
        unet=unet,
        vae=autoencoder,
        schedule=_schedule(found.levels.value if found.levels else family.levels, found),
        prediction="v" if found.prediction.value == "v" else "eps",
        latent_scale=found.latent_scale.value,
        device=target,
        dtype=dtype,
    )
    text = TextConditioner(encoders, recipe, Tokenizer())
    vae_file = vae[0] if vae is not None else None
    return model_class(file=file, found=found, family=family, core=core, text=text, vae_file=vae_file)


def fill(model: Model, stage: str) -> None:
    """Fill the networks of `stage` ("text encoder", "U-Net" or "VAE"), as `load` does, after `Model.unload`."""
    if stage == "VAE":
        source = (model.file, model.found) if model.vae_file is None else (model.vae_file, identify(model.vae_file))
        loaded = load_vae(*source, model.device, model.dtype)
        model.vae.load_state_dict(loaded.state_dict(), assign=True)
        return
    networks = {"unet": model.unet} if stage == "U-Net" else model.text_encoders
    for name, network in networks.items():
        _assign(network, model.found.component(name), model.file, model.device, model.dtype)


def _family(found: Found) -> Family:
    where = printable(str(found.path))
    if found.kind.value not in ("checkpoint", "diffusers folder"):
        raise ModelError(f"{where} is not a model to paint with: it is {found.kind.value} ({found.kind.evidence})")
    if found.family.value is None:
        raise ModelError(f"{where}: its family is not recognised ({found.family.evidence}); name it with --family")
    family = found.family.value
    if any(place.spec is None for place in family.locations):
        raise ModelError(f"{where} is {family.title}, which can be inspected and converted but not painted with yet")
    return family


def _no_unknowns(found: Found) -> None:
    """Tensors outside the parts cannot change the picture, and many merges carry some; inside, one may be a layer."""
    inside = [name for name in found.unknown if name not in found.outside]
    if inside:
        names = ", ".join(printable(name, 80) for name in inside[:3])
        family = found.family.value
        raise ModelError(
            f"{printable(str(found.path))} looks like {family.title if family else 'nothing known'}, but holds "
            f"{plural(len(inside), 'tensor')} that its parts do not have: {names}; `gouache prune` writes a file "
            "without them"
        )


def _spec(expected: type[AnySpec], component: Component, file: ModelFile) -> AnySpec:
    if not isinstance(component.spec, expected):
        raise ModelError(f"{printable(str(file.path))}: {component.name} has a form that is not supported")
    return component.spec


def _check_parts(
    found: Found, unet: UNetSpec, latent_channels: int, texts: Mapping[str, TextSpec], recipe: TextRecipe
) -> None:
    """Raise ModelError if the parts, each of them complete, are not of one model."""
    where = printable(str(found.path))
    family = found.family.value
    if family is None or found.variant.value not in family.variants.values():
        raise ModelError(f"{where}: the variant {found.variant.value} cannot be painted with yet")
    context = sum(text.width for text in texts.values())
    vector = 0
    if recipe.pooled is not None:
        numbers = {"sdxl": 6, "refiner": 5, None: 0}[recipe.size_ids]
        vector = (texts[recipe.pooled].projection or texts[recipe.pooled].width) + numbers * recipe.size_width
    for what, expected, source, given in (
        ("cross-attention width", unet.context_dim, "the text encoders give", context),
        ("vector width (pooled prompt and sizes)", unet.vector_channels, "the text encoders give", vector),
        ("latent channels", unet.out_channels, "the VAE has", latent_channels),
    ):
        if expected != given:
            raise ModelError(
                f"{where}: its parts are not of one model: the U-Net expects {what} {expected}, {source} {given}"
            )


def _network(
    build: Callable[[AnySpec], Network],
    spec: AnySpec,
    component: Component,
    file: ModelFile,
    device: torch.device,
    dtype: torch.dtype,
) -> Network:
    with torch.device("meta"):
        network = build(spec)
    _assign(network, component, file, device, dtype)
    return network.eval()


def _assign(
    network: nn.Module, component: Component, file: ModelFile, device: torch.device, dtype: torch.dtype
) -> None:
    assign(network, _Tensors(component, file), device=device, dtype=dtype)
    if dtype != torch.float32:
        # Convolutions are up to a fifth faster so. In float32 it is a thirtieth, and mapped weights would be copied.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a component under the names of the network, each read on access."""

    def __init__(self, component: Component, file: ModelFile) -> None:
        self._origins = component.origins
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        return self._origins[name].tensor(self._file.tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)


def _schedule(levels: NoiseLevels, found: Found) -> Schedule:
    if levels.kind == "edm":
        schedule = Schedule.edm(levels.low, levels.high)
    else:
        schedule = Schedule.scaled_linear(levels.low, levels.high, levels.steps)
    return schedule.zero_terminal_snr() if found.zero_snr is not None and found.zero_snr.value else schedule
