"""What a request splices into the model while it is painted: files by name, strengths as users write them.

style.safetensors:0.8              a LoRA at 0.8, in the text encoders too
style:0.8:te=0.5                   the text encoders at 0.5; te1=, te2= for one of SDXL's
style:1:start=0.2:end=0.8          the U-Net's part from a fifth to four fifths of the steps
<lora:style:0.8>                   the same in a prompt, as in A1111's web UI; <lora:style:0.5:1> is te, then U-Net
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from gouache.adapters.attach import How
from gouache.adapters.strength import strength
from gouache.errors import RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import sha256_of
from gouache.generate.request import Request
from gouache.model.model import Model
from gouache.model.splice import Attached, attach
from gouache.model.vae import load_vae, must_fit
from gouache.prompts.tags import take_tags

Kind = Literal["lora", "embedding", "hypernetwork", "vae"]
AUTOMATIC, OWN = "automatic", "none"
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_KEYS = {name: name for name in ("te", "te1", "te2", "unet", "start", "end", "how", "blocks")}
_KEYS |= {"text": "te", "lbw": "blocks"}


class Shelf(Protocol):
    """Where files are found by name; the library, or `Paths`."""

    def find(self, kind: Kind, name: str) -> Path:
        """The file that `name` means. Raises RequestError where there is none."""
        ...

    def mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        """The embeddings whose names stand in `prompts`, for text encoders of these widths."""
        ...

    def usual_strength(self, path: Path) -> float:
        """That of a LoRA for which none is said."""
        ...

    def sha256(self, path: Path) -> str: ...


class Paths:
    """A shelf that knows paths alone."""

    def find(self, kind: Kind, name: str) -> Path:
        path = Path(name).expanduser()
        if not path.exists():
            raise RequestError(kind, f"there is no file {printable(name)}")
        return path

    def mentioned(self, prompts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        return {}

    def usual_strength(self, path: Path) -> float:
        return 1.0

    def sha256(self, path: Path) -> str:
        return sha256_of(path)


@dataclass(frozen=True)
class Told:
    """A LoRA or hypernetwork as a user writes it. `unet` None: whatever is usual for it."""

    name: str
    unet: float | None = None
    text: float | Mapping[str, float] | None = None
    start: float = 0.0
    end: float = 1.0
    how: How | None = None
    blocks: str | None = None


def read_told(setting: str, text: str) -> Told:
    """`text` in its parts; a name may hold colons, as Windows paths do. Raises RequestError."""
    parts = text.split(":")
    knobs: dict[str, str] = {}
    numbers: list[str] = []
    while len(parts) > 1:
        key, sign, value = parts[-1].strip().partition("=")
        if sign and key.strip().lower() in _KEYS:
            knobs[_KEYS[key.strip().lower()]] = value.strip()
        elif _NUMBER.fullmatch(parts[-1].strip()):
            numbers.insert(0, parts[-1].strip())
        else:
            break
        parts.pop()
    name = ":".join(parts).strip()
    if not name or len(numbers) > 2:
        raise RequestError(
            setting, f"{printable(text, 80)!r} is not NAME[:STRENGTH][:te=STRENGTH][:start=0.2][:end=0.8]"
        )
    if len(numbers) == 2:
        knobs = {"te": numbers[0], "unet": numbers[1]} | knobs
    elif numbers:
        knobs = {"unet": numbers[0]} | knobs
    how, blocks = knobs.pop("how", None), knobs.pop("blocks", None)
    if how not in (None, "folded", "live"):
        raise RequestError(setting, f"how={printable(how, 20)} is not known; use folded or live")
    try:
        told = {key: float(value) for key, value in knobs.items()}
    except ValueError:
        raise RequestError(setting, f"{printable(text, 80)!r} has a strength that is no number") from None
    start, end = told.get("start", 0.0), told.get("end", 1.0)
    text_strength: float | dict[str, float] | None = told.get("te")
    if "te1" in told or "te2" in told:
        each = {"text_encoder": told.get("te1", told.get("te")), "text_encoder_2": told.get("te2", told.get("te"))}
        text_strength = {name: number for name, number in each.items() if number is not None}
    if not 0 <= start < end <= 1:
        raise RequestError(setting, f"{printable(text, 80)!r}: start and end are shares of the steps, 0 to 1, in turn")
    return Told(name, told.get("unet"), text_strength, start, end, cast("How | None", how), blocks)


@dataclass(frozen=True)
class Spliced:
    """One file in the model, for the recipe: what it is, where from, how much of it was used."""

    kind: Kind
    path: Path
    sha256: str
    told: str
    attached: Attached | None = None

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "kind": self.kind,
            "name": self.path.stem,
            "told": self.told,
            "path": str(self.path),
            "sha256": self.sha256,
        }
        if (on := self.attached) is not None:
            values |= {"form": on.kind, "matched": on.matched, "unmatched": len(on.unmatched)}
            values |= {"wrong_shape": len(on.wrong_shape)}
            if self.kind != "embedding":
                values |= {"how": on.how, "strength": on.strength.to_json()}
        return values

    def __str__(self) -> str:
        """'style [0123456789]: lora, 192 modules, ...'"""
        if self.attached is None:
            return f"{self.path.name} [{self.sha256[:10]}]: VAE"
        return f"{self.attached.name} [{self.sha256[:10]}]: {self.attached.told}"


@contextmanager
def spliced(model: Model, request: Request, shelf: Shelf) -> Iterator[tuple[Request, list[Spliced]]]:
    """`model` with what `request` names, for as long as the block runs; (the request without tags, what was used).

    Raises before anything is painted where a file cannot be found or does not fit; the model then is as it was.
    """
    prompt, tags = take_tags(request.prompt)
    with ExitStack() as stack:
        done = [_by_hand(each, shelf) for each in model.attached]
        if request.vae is not None and request.vae.lower() != AUTOMATIC:
            _exchange(model, request.vae, shelf, stack)
        if model.vae_file is not None:
            done.append(Spliced("vae", model.vae_file.path, shelf.sha256(model.vae_file.path), request.vae or ""))
        blocks = _blocks(request, shelf)
        loras = [*request.lora, *(tag.told for tag in tags if tag.kind in ("lora", "lyco"))]
        for text in loras:
            told = read_told("lora", text)
            path = shelf.find("lora", told.name)
            usual = shelf.usual_strength(path) if told.unet is None else told.unet
            by_block = told.blocks or blocks.get(path.resolve())
            chosen = strength(usual, told.text, by_block, told.start, told.end, model.unet.spec)
            on = attach(model, open_model(path), chosen, how=told.how)
            stack.callback(on.detach)
            done.append(Spliced("lora", path, shelf.sha256(path), text, on))
        for path in blocks.keys() - {each.path.resolve() for each in done}:
            raise RequestError("lora_blocks", f"{path} is no LoRA of this request; name it with lora too")
        for text in [*request.hypernet, *(tag.told for tag in tags if tag.kind == "hypernet")]:
            told = read_told("hypernet", text)
            path = shelf.find("hypernetwork", told.name)
            on = attach(model, open_model(path), 1.0 if told.unet is None else told.unet)
            stack.callback(on.detach)
            done.append(Spliced("hypernetwork", path, shelf.sha256(path), text, on))
        asked = [(shelf.find("embedding", name), name) for name in request.embedding]
        named = {path.stem: (path, name) for path, name in asked}
        mentioned = shelf.mentioned([prompt, request.negative], model.text_widths)
        found = {name: (path, "") for name, path in mentioned.items() if name not in model.embeddings}
        for name, (path, text) in {**found, **named}.items():
            on = attach(model, open_model(path), name=name)
            stack.callback(on.detach)
            done.append(Spliced("embedding", path, shelf.sha256(path), text, on))
        yield replace(request, prompt=prompt), done


def _blocks(request: Request, shelf: Shelf) -> dict[Path, str]:
    """{LoRA: its block weights} of the settings "NAME=PRESET"."""
    found: dict[Path, str] = {}
    for text in request.lora_blocks:
        name, sign, told = text.partition("=")
        if not sign or not name.strip() or not told.strip():
            raise RequestError("lora_blocks", f"{printable(text, 80)!r} is not NAME=PRESET or NAME=NUMBERS")
        found[shelf.find("lora", name.strip()).resolve()] = told.strip()
    return found


def _by_hand(attached: Attached, shelf: Shelf) -> Spliced:
    """What the caller attached before."""
    kinds: dict[str, Kind] = {"embedding": "embedding", "hypernetwork": "hypernetwork"}
    path = attached.file.path
    return Spliced(kinds.get(attached.kind, "lora"), path, shelf.sha256(path), "", attached)


def _exchange(model: Model, name: str, shelf: Shelf, stack: ExitStack) -> None:
    """Another autoencoder for a while; "none" is the checkpoint's own."""
    own = name.lower() == OWN
    path = model.file.path if own else shelf.find("vae", name)
    now = model.file.path if model.vae_file is None else model.vae_file.path
    if now == path:
        return
    file = model.file if own else open_model(path)
    vae = load_vae(file, model.found if own else identify(file), model.device, model.dtype)
    must_fit(path, vae, model.vae)
    before = model.vae, model.vae_file

    def back() -> None:
        model.vae, model.vae_file = before

    stack.callback(back)
    model.vae = vae
    model.vae_file = None if own else file
