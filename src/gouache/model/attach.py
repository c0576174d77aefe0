"""Adapter files attached to a loaded model: LoRAs, embeddings, hypernetworks; counted, and detached without a trace."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from gouache.adapters.attach import AttachedAdapter, How
from gouache.adapters.embedding import Vectors, bundled_vectors, check_widths, vectors_of
from gouache.adapters.hypernetwork import HypernetworkHooks, read_hypernetwork
from gouache.adapters.read import read_lora
from gouache.adapters.strength import Strength
from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.record import ModelFile
from gouache.layouts.adapters import FORMATS
from gouache.layouts.modules import module_names
from gouache.model.model import Model


@dataclass(eq=False, repr=False)
class Attached:
    """An adapter on a model.

    `kind` is a LoRA format as `identify` names it, "embedding" or "hypernetwork". `matched` counts the modules (for an
    embedding, the vectors) that it changes. `unmatched` maps tensor names for which the model has no module to the
    nearest name it has, "" where none is near; `wrong_shape` maps modules to the reason why the file's tensors do not
    fit. `embeddings`: those that prompts can use now.
    """

    name: str
    kind: str
    file: ModelFile
    strength: Strength
    matched: int
    unmatched: Mapping[str, str] = field(default_factory=dict)
    wrong_shape: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, Vectors] = field(default_factory=dict, repr=False)
    on_weights: AttachedAdapter | None = field(default=None, repr=False)
    hooks: HypernetworkHooks | None = field(default=None, repr=False)
    _model: Model | None = field(default=None, repr=False)
    _upcast: tuple[str, ...] = ()  # the stages in float32 before it was attached
    _removes: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def how(self) -> str:
        """How a LoRA acts: "folded" or "live"; "" for other adapters."""
        return self.on_weights.how if self.on_weights is not None else ""

    def detach(self) -> None:
        """Detach it; weights are bit for bit what they were without it. A second call does nothing."""
        if self._model is None or self not in self._model.attached:
            return
        with self._model.exclusive():
            self.disable()
            if self.on_weights is not None:
                self._model.adapters.detach(self.on_weights)
            for stage in [each for each in self._model.upcast if each not in (*self._upcast, "VAE")]:
                self._model.narrow(stage)  # it may have been the cause; a run finds out again

    def change(self, strength: float | Strength) -> None:
        """Change the strength; only modules for which it differs are computed again."""
        strength = _checked(strength)
        where = printable(str(self.file.path))
        if self.kind == "embedding":
            raise ModelError(f"{where}: an embedding has no strength of its own; write ({self.name}:1.2) in the prompt")
        if self._model is None or self not in self._model.attached:
            raise ModelError(f"{where} is not attached; attach it again")
        with self._model.exclusive():
            if self.on_weights is not None:
                self._model.adapters.change(self.on_weights, strength)
            elif self.hooks is not None:
                self.hooks.strength = strength.unet
        self.strength = strength

    def enable(self) -> None:
        """Make its embeddings and hooks work and list it with the model; its weights are `Adapters`' part."""
        assert self._model is not None
        if self not in self._model.attached:
            self._model.attached.append(self)
        if not self._removes:
            self._removes = [self._model.embeddings.add(name, vectors) for name, vectors in self.embeddings.items()]
        if self.hooks is not None:
            self.hooks.attach()

    def disable(self) -> None:
        """The reverse of `enable`; can be called again after an interrupt."""
        assert self._model is not None
        while self._removes:
            self._removes[-1]()
            self._removes.pop()
        if self.hooks is not None:
            self.hooks.remove()
        self._model.attached[:] = [each for each in self._model.attached if each is not self]

    def __str__(self) -> str:
        """'style: lora, 192 modules, folded, strength 0.8; 3 names unmatched, 1 of another shape'."""
        return f"{self.name}: {self.summary}"

    def __repr__(self) -> str:
        return f"<Attached {self}>"

    @property
    def summary(self) -> str:
        """What it is and how much of it is used, in words."""
        unit = ("vector" if self.kind == "embedding" else "module") + "s" * (self.matched != 1)
        parts = [f"{self.kind}, {self.matched} {unit}", *([self.how] if self.how else [])]
        if self.kind != "embedding":
            parts.append(f"strength {_strength(self.strength)}")
            parts += [f"with the word {printable(name, 60)}" for name in self.embeddings]
        text = ", ".join(parts)
        unused = []
        if self.unmatched:
            count = len(self.unmatched)
            unused.append(f"{count} name{'s' * (count != 1)} unmatched")
        if self.wrong_shape:
            unused.append(f"{len(self.wrong_shape)} of another shape")
        if self.unmatched:
            name, near = next(iter(self.unmatched.items()))
            unused.append(f"the first is {printable(name, 80)}" + (f", nearest {near}" if near else ""))
        return f"{text}; {', '.join(unused)}" if unused else text


def attach(
    model: Model,
    file: ModelFile,
    strength: float | Strength = 1.0,
    *,
    how: How | None = None,
    name: str | None = None,
) -> Attached:
    """Attach the adapter in `file` to `model`, whole or not at all, for every request until its `detach`.

    `how` None folds a LoRA into the weights, or lets it act live if its strength changes by step or the weights have
    too few bits. `name` is an embedding's name in prompts, by default its file's name. Waits for a request that is
    using the model. Raises ModelError for a file of another family, one of which nothing fits, or one that is not an
    adapter.
    """
    with model.exclusive():
        return attach_unlocked(model, file, strength, how=how, name=name)


def attach_unlocked(
    model: Model, file: ModelFile, strength: float | Strength, *, how: How | None, name: str | None
) -> Attached:
    """`attach` for a caller that holds the model."""
    strength = _checked(strength)
    if how not in (None, *get_args(How)):
        raise RequestError("how", f"{printable(str(how), 40)!r} is not known; use {' or '.join(get_args(How))}")
    found = identify(file)
    kind = found.kind.value
    if kind in FORMATS:
        attached = _lora(model, file, found, strength, how)
    elif kind == "embedding":
        attached = _embedding(model, file, name or file.path.stem)
    elif kind == "hypernetwork":
        attached = _hypernetwork(model, file, strength)
    else:
        raise ModelError(
            f"{printable(str(file.path))} cannot be attached: it is {kind} ({found.kind.evidence}); LoRAs, embeddings "
            f"and hypernetworks can, and a VAE is given as vae"
        )
    attached._model, attached._upcast = model, tuple(model.upcast)
    try:
        attached.enable()
    except BaseException:
        attached.disable()
        if attached.on_weights is not None:
            model.adapters.detach(attached.on_weights)
        raise
    return attached


def _checked(strength: float | Strength) -> Strength:
    if isinstance(strength, Strength):
        return strength
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real):
        raise RequestError("strength", f"{printable(repr(strength), 40)} is not a number or a Strength")
    return Strength(float(strength))


def _lora(model: Model, file: ModelFile, found: Found, strength: Strength, how: How | None) -> Attached:
    where = printable(str(file.path))
    family = found.family.value
    if family is not None and family.name != model.family.name and not _related(family.name, model.family.name):
        raise ModelError(
            f"{where} is a {found.kind.value} for {family.title} ({found.family.evidence}); the model is "
            f"{model.family.title}, so nothing of it was used"
        )
    adapter = read_lora(file, module_names(model.specs))
    if not adapter.tensors:
        first = next(iter(adapter.unmatched), "none")
        raise ModelError(
            f"{where} changes none of the modules of {model.family.title}: its {len(adapter.unmatched)} names are for "
            f"{family.title if family is not None else 'another network'}, the first is {printable(first, 80)}"
        )
    embeddings = {name: bundled_vectors(file, names) for name, names in adapter.embeddings.items()}
    for vectors in embeddings.values():
        check_widths(file, vectors, model.text_widths)
    on_weights = model.adapters.attach(adapter, strength, how)
    return Attached(
        name=file.path.stem,
        kind=found.kind.value,
        file=file,
        strength=strength,
        matched=len(on_weights.modules),
        unmatched=adapter.unmatched,
        wrong_shape=on_weights.wrong_shape,
        embeddings=embeddings,
        on_weights=on_weights,
    )


def _related(one: str, other: str) -> bool:
    """Whether networks of both families share modules: the refiner's text encoder is SDXL's second."""
    return {one, other} == {"sdxl", "sdxl-refiner"}


def _embedding(model: Model, file: ModelFile, name: str) -> Attached:
    vectors = vectors_of(file)
    check_widths(file, vectors, model.text_widths)
    count = len(next(iter(vectors.values())))
    return Attached(name, "embedding", file, Strength(), count, embeddings={name: vectors})


def _hypernetwork(model: Model, file: ModelFile, strength: Strength) -> Attached:
    hypernetwork = read_hypernetwork(file)
    hooks = HypernetworkHooks(model.unet, hypernetwork.pairs, strength.unet)
    context = model.unet.spec.context_dim
    widths = ", ".join(map(str, hypernetwork.pairs))
    if context not in hypernetwork.pairs and (not hooks.modules or {768, 1024, 2048} & set(hypernetwork.pairs)):
        raise ModelError(
            f"{printable(str(file.path))} changes inputs of width {widths}; this model's prompts have width {context}, "
            f"so it is for another family"
        )
    return Attached(
        name=file.path.stem, kind="hypernetwork", file=file, strength=strength, matched=len(hooks.modules),
        unmatched={str(width): "" for width in hooks.unused}, hooks=hooks,
    )  # fmt: skip


def _strength(strength: Strength) -> str:
    text = f"{strength.unet:g}"
    if isinstance(strength.text, Mapping):
        text += f" ({', '.join(f'{name} {number:g}' for name, number in strength.text.items())})"
    elif strength.text is not None and strength.text != strength.unet:
        text += f" (text encoders {strength.text:g})"
    if strength.blocks is not None:
        text += ", by block"
    if not strength.whole_run:
        text += f", from {strength.start:.0%} to {strength.end:.0%} of the steps"
    return text
