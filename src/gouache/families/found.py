"""Found: what identify says of a file, each statement with its evidence and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from gouache.errors import ModelError, printable
from gouache.families.family import Family, Levels, Spec
from gouache.layouts.rules import Origin, Rule
from gouache.prompts.recipe import TextRecipe

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Sure = Literal["certain", "likely", "guess", "told"]


@dataclass(frozen=True)
class Fact(Generic[T_co]):
    """A statement about a file. "told" is what the caller said, whatever the file says."""

    value: T_co
    evidence: str
    sure: Sure


def settle(hints: Iterable[Fact[T]], told: Fact[T] | None = None) -> Fact[T] | None:
    """The first, which is the strongest, of `hints`, or what was told; whatever contradicts it is mentioned."""
    every = ([told] if told is not None else []) + list(hints)
    if not every:
        return None
    against = [hint.evidence for hint in every[1:] if hint.value != every[0].value]
    if not against:
        return every[0]
    return replace(every[0], evidence=f"{every[0].evidence}; against it: {'; '.join(against)}")


@dataclass(frozen=True)
class Component:
    """A network that is whole in the file, under `prefix`. `origins` says where each of its tensors comes from.

    `rules` is the same as a table, to write the component back with (`layouts.rules.invert`). `spec` is None where the
    network is not built yet. `layout` is how the file names it: "original", "diffusers", "openclip", "transformers".
    """

    name: str
    prefix: str
    spec: Spec | None
    layout: str
    dtype: Fact[str]
    evidence: str
    rules: tuple[Rule, ...] = field(repr=False)
    origins: Mapping[str, Origin] = field(repr=False)


@dataclass(frozen=True)
class Found:
    """What a file is. `None` stands for a statement that its kind does not allow, such as a LoRA's prediction.

    `kind` is "checkpoint", "diffusers folder", the name of a single component, of an adapter format, "embedding",
    "hypernetwork", "controlnet", "upscaler", another thing's name, or "unknown". `variant` is what the U-Net's input
    channels are for, or the form of an adapter. `missing` maps each component that a model of this family needs, and
    the file has not or not whole, to what is wrong. `leftovers` maps tensors that nothing needs to the reason;
    `unknown` are tensors that nothing here can name. `ema_names` maps names of the U-Net to those of their averages.
    """

    path: Path
    kind: Fact[str]
    family: Fact[Family | None]
    variant: Fact[str | None]
    prediction: Fact[str] | None = None
    zero_snr: Fact[bool] | None = None
    levels: Fact[Levels] | None = None
    latent_scale: Fact[float] | None = None
    size: Fact[tuple[int, int]] | None = None
    ema: Fact[str] | None = None
    components: Mapping[str, Component] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    leftovers: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    ema_names: Mapping[str, str] = field(default_factory=dict, repr=False)

    def component(self, name: str) -> Component:
        """The component `name`, whole; ModelError that says what is missing, and what the file looks like."""
        if name in self.components:
            return self.components[name]
        family = self.family.value
        looks = f"{self.kind.value} of {family.title}" if family else self.kind.value
        reason = self.missing.get(name, f"the file holds {', '.join(self.components) or 'none of a model'}")
        raise ModelError(f"{printable(str(self.path))} has no usable {name}: {reason}; it looks like a {looks}")

    @property
    def text_recipe(self) -> TextRecipe | None:
        """The family's recipe, for the text encoders as they stand in this file.

        SD2 reads the block before the last. diffusers stores its encoder without the last one (23 blocks instead of
        24), so that there the last of the file is the one to read.
        """
        family = self.family.value
        if family is None or family.text is None or family.name != "sd2" or "text_encoder" not in self.components:
            return family.text if family else None
        encoder = self.components["text_encoder"]
        cut = encoder.layout != "openclip" or getattr(encoder.spec, "layers", 0) == 23
        encoders = tuple(replace(each, layer=1) if cut else each for each in family.text.encoders)
        return replace(family.text, encoders=encoders)
