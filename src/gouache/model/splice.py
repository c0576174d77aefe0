"""What is spliced into a loaded model, counted: LoRAs, embeddings, hypernetworks; and taken off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gouache.adapters.attach import How, Layer
from gouache.adapters.embedding import bundled_vectors, must_fit, vectors_of
from gouache.adapters.hypernetwork import Worn, read_hypernetwork
from gouache.adapters.read import read_lora
from gouache.adapters.strength import Strength
from gouache.errors import ModelError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.record import ModelFile
from gouache.layouts.adapters import FORMATS
from gouache.layouts.modules import module_names
from gouache.model.model import Model


@dataclass(eq=False)
class Attached:
    """An adapter on a model.

    `kind` is a format of LoRA as `identify` names it, "embedding" or "hypernetwork". `matched` counts the modules (for
    an embedding, the vectors) that it changes. `unmatched`: names of the file that the model has no module for -> the
    nearest that it has, "" where none is near; `wrong_shape`: modules -> why the file's tensors do not fit them.
    `words`: embeddings that prompts can use now.
    """

    name: str
    kind: str
    file: ModelFile
    strength: Strength
    matched: int
    unmatched: Mapping[str, str] = field(default_factory=dict)
    wrong_shape: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    layer: Layer | None = field(default=None, repr=False)
    _detach: Callable[[], None] = field(default=lambda: None, repr=False)
    _change: Callable[[Strength], None] | None = field(default=None, repr=False)

    @property
    def how(self) -> str:
        """How a LoRA acts."""
        return self.layer.how if self.layer is not None else ""

    def detach(self) -> None:
        """Take it off; weights are bit for bit what they were without it. A second time does nothing."""
        self._detach()

    def change(self, strength: float | Strength) -> None:
        """Another strength; nothing is read again that it does not concern."""
        strength = strength if isinstance(strength, Strength) else Strength(strength)
        if self._change is None:
            raise ModelError(
                f"{printable(str(self.file.path))}: {self.kind} has no strength of its own; write (name:1.2)"
            )
        self._change(strength)
        self.strength = strength

    def __str__(self) -> str:
        """'style: lora, 192 modules, folded, strength 0.8; 3 names unmatched, 1 of another shape'."""
        return f"{self.name}: {self.told}"

    @property
    def told(self) -> str:
        """What it is and how much of it was used, in words."""
        what = ("vector" if self.kind == "embedding" else "module") + "s" * (self.matched != 1)
        parts = [f"{self.kind}, {self.matched} {what}", *([self.how] if self.how else [])]
        if self.kind != "embedding":
            parts.append(f"strength {_strength(self.strength)}")
        text = ", ".join(parts)
        odd = [f"{len(self.unmatched)} names unmatched"] if self.unmatched else []
        odd += [f"{len(self.wrong_shape)} of another shape"] if self.wrong_shape else []
        if self.unmatched:
            name, near = next(iter(self.unmatched.items()))
            odd.append(f"the first is {printable(name, 80)}" + (f", nearest {near}" if near else ""))
        return f"{text}; {', '.join(odd)}" if odd else text


def attach(
    model: Model,
    file: ModelFile,
    strength: float | Strength = 1.0,
    *,
    how: How | None = None,
    name: str | None = None,
) -> Attached:
    """Splice the adapter in `file` into `model`, whole or not at all.

    `how` None folds a LoRA into the weights, or lets it act live where its strength changes by step or the weights
    have too few bits. `name` is what an embedding is called in prompts: else its file's name. Raises ModelError for a
    file of another family, of which nothing fits, or that is no adapter.
    """
    strength = strength if isinstance(strength, Strength) else Strength(strength)
    found = identify(file)
    kind = found.kind.value
    if kind in FORMATS:
        attached = _attach_lora(model, file, found, strength, how)
    elif kind == "embedding":
        attached = _attach_embedding(model, file, name or file.path.stem)
    elif kind == "hypernetwork":
        attached = _attach_hypernetwork(model, file, strength)
    else:
        raise _no_adapter(file, found)
    take_off = attached._detach

    def detach() -> None:
        try:
            take_off()
        finally:
            model.attached[:] = [each for each in model.attached if each is not attached]

    attached._detach = detach
    model.attached.append(attached)
    return attached


def _no_adapter(file: ModelFile, found: Found) -> ModelError:
    kind = found.kind.value
    return ModelError(
        f"{printable(str(file.path))} cannot be attached: it is {kind} ({found.kind.evidence}); LoRAs, embeddings and "
        f"hypernetworks can, and a VAE is given as vae"
    )


def _attach_lora(model: Model, file: ModelFile, found: Found, strength: Strength, how: How | None) -> Attached:
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
    words = {word: bundled_vectors(file, names) for word, names in adapter.embeddings.items()}
    for vectors in words.values():
        must_fit(file, vectors, model.text_widths)
    layer = model.layers.attach(adapter, strength, how)
    removes = [model.embeddings.add(word, vectors) for word, vectors in words.items()]

    def detach() -> None:
        model.layers.detach(layer)
        for remove in removes:
            remove()

    return Attached(
        name=file.path.stem,
        kind=found.kind.value,
        file=file,
        strength=strength,
        matched=len(layer.modules),
        unmatched=adapter.unmatched,
        wrong_shape=layer.wrong_shape,
        words=tuple(words),
        layer=layer,
        _detach=detach,
        _change=lambda other: model.layers.change(layer, other),
    )


def _related(one: str, other: str) -> bool:
    """Whether networks of both lines share modules: the refiner's second encoder is SDXL's."""
    return {one, other} == {"sdxl", "sdxl-refiner"}


def _attach_embedding(model: Model, file: ModelFile, name: str) -> Attached:
    vectors = vectors_of(file)
    must_fit(file, vectors, model.text_widths)
    remove = model.embeddings.add(name, vectors)
    count = len(next(iter(vectors.values())))
    return Attached(name, "embedding", file, Strength(), count, words=(name,), _detach=remove)


def _attach_hypernetwork(model: Model, file: ModelFile, strength: Strength) -> Attached:
    hypernetwork = read_hypernetwork(file)
    worn = Worn(model.unet, hypernetwork, strength.unet)
    context = model.unet.spec.context_dim
    widths = ", ".join(map(str, hypernetwork.pairs))
    if context not in hypernetwork.pairs and not worn.modules:
        worn.remove()
        raise ModelError(
            f"{printable(str(file.path))} acts on contexts {widths} wide, and this U-Net has none of them (its prompts "
            f"are {context} wide); it is for another family"
        )
    if context not in hypernetwork.pairs and {768, 1024, 2048} & set(hypernetwork.pairs):
        worn.remove()
        raise ModelError(
            f"{printable(str(file.path))} is for prompts {widths} wide; this model's are {context} wide, so it is for "
            f"another family"
        )

    def change(other: Strength) -> None:
        if worn.removed:
            raise ModelError(f"{printable(str(file.path))} is not attached; attach it again")
        worn.strength = other.unet

    unmatched = {str(width): "" for width in worn.unused}
    return Attached(
        name=file.path.stem, kind="hypernetwork", file=file, strength=strength, matched=len(worn.modules),
        unmatched=unmatched, _detach=worn.remove, _change=change,
    )  # fmt: skip


def _strength(strength: Strength) -> str:
    told = f"{strength.unet:g}"
    if isinstance(strength.text, Mapping):
        told += f" ({', '.join(f'{name} {number:g}' for name, number in strength.text.items())})"
    elif strength.text is not None and strength.text != strength.unet:
        told += f" (text encoders {strength.text:g})"
    if strength.blocks is not None:
        told += ", by block"
    if not strength.whole_run:
        told += f", from {strength.start:.0%} to {strength.end:.0%} of the steps"
    return told
