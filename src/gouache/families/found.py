"""Found: the result of `identify`; each statement about the file has its evidence and a confidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from gouache.errors import ModelError, printable
from gouache.families.family import Family, NoiseLevels, Spec
from gouache.layouts.rules import Origin, Rule
from gouache.prompts.recipe import TextRecipe

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Confidence = Literal["certain", "likely", "guess", "override"]


@dataclass(frozen=True)
class Fact(Generic[T_co]):
    """A statement about a file. The confidence "override" means that the caller set the value by an option."""

    value: T_co
    evidence: str
    confidence: Confidence


def strongest(hints: Iterable[Fact[T]], override: Fact[T] | None = None) -> Fact[T] | None:
    """`override`, or else the first of `hints` (strongest first); contradicting hints are added to its evidence."""
    every = ([override] if override is not None else []) + list(hints)
    if not every:
        return None
    contrary = [hint.evidence for hint in every[1:] if hint.value != every[0].value]
    if not contrary:
        return every[0]
    return replace(every[0], evidence=f"{every[0].evidence}; contradicted by: {'; '.join(contrary)}")


@dataclass(frozen=True)
class Component:
    """A complete network in the file, under `prefix`. `origins` maps each of its tensors to tensors of the file.

    `rules` is the same mapping as a table, used to write the component back (`layouts.rules.invert`). `spec` is None
    if the network is not implemented yet. `layout` is the naming in the file: "original", "diffusers", "openclip",
    "transformers".
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
    """What a file is. `None` means that the statement does not apply to its kind, such as a LoRA's prediction.

    `kind` is "checkpoint", "diffusers folder", the name of a single component or of an adapter format, "embedding",
    "hypernetwork", "controlnet", "upscaler", the name of another kind of file, or "unknown". `variant` follows from
    the U-Net's input channels, or is the format of an adapter. `missing` maps each component that a model of this
    family needs, but that is absent or incomplete in the file, to what is wrong; those in `absent` have no tensor in
    the file. `leftovers` maps tensors that nothing
    needs to the reason; `unknown` are tensors that no table names, and `outside` those among them that are not inside
    a part of the model, so that they cannot change it. `ema_names` maps tensor names of the U-Net to those of their
    averages.
    """

    path: Path
    kind: Fact[str]
    family: Fact[Family | None]
    variant: Fact[str | None]
    prediction: Fact[str] | None = None
    zero_snr: Fact[bool] | None = None
    levels: Fact[NoiseLevels] | None = None
    latent_scale: Fact[float] | None = None
    size: Fact[tuple[int, int]] | None = None
    ema: Fact[str] | None = None
    components: Mapping[str, Component] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    leftovers: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    outside: frozenset[str] = frozenset()
    ema_names: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def unusable(self) -> dict[str, str]:
        """The components that are in the file but cannot be used -> what is wrong."""
        return {name: reason for name, reason in self.missing.items() if name not in self.absent}

    def component(self, name: str) -> Component:
        """The component `name`. Raises ModelError, with what is missing and what the file looks like, if incomplete."""
        if name in self.components:
            return self.components[name]
        family = self.family.value
        looks = f"{self.kind.value} of {family.title}" if family else self.kind.value
        reason = self.missing.get(name, f"the file has {', '.join(self.components) or 'no component of a model'}")
        raise ModelError(f"{printable(str(self.path))} has no usable {name}: {reason}; the file looks like: {looks}")

    @property
    def text_recipe(self) -> TextRecipe | None:
        """The family's text recipe, adapted to the text encoders in this file.

        SD2 uses the output of the block before the last. diffusers stores its encoder without the last block (23
        instead of 24), so for such a file the last block is used.
        """
        family = self.family.value
        if family is None or family.text is None or family.name != "sd2" or "text_encoder" not in self.components:
            return family.text if family else None
        encoder = self.components["text_encoder"]
        cut = encoder.layout != "openclip" or getattr(encoder.spec, "layers", 0) == 23
        encoders = tuple(replace(each, layer=1) if cut else each for each in family.text.encoders)
        return replace(family.text, encoders=encoders)
