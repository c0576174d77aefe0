"""The adapters of a request: files by name, with strengths as users write them.

style.safetensors:0.8              a LoRA at 0.8, in the text encoders too
style:0.8:te=0.5                   the text encoders at 0.5; te1=, te2= for each of SDXL's
style:1:start=0.2:end=0.8          its U-Net part from 20 % to 80 % of the steps
<lora:style:0.8>                   the same in a prompt, as in A1111's web UI; <lora:style:0.5:1> is te, then U-Net
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from gouache.adapters.attach import How
from gouache.adapters.strength import Strength, strength
from gouache.errors import GouacheError, RequestError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile, sha256_of
from gouache.generate.prompting import read_texts
from gouache.generate.request import Request
from gouache.layouts.adapters import bundled
from gouache.model.attach import Attached
from gouache.model.lease import Use
from gouache.model.model import Model
from gouache.model.vae import AnyVae, check_compatible, load_vae
from gouache.prompts.embedding_names import used
from gouache.prompts.tags import Tag

Kind = Literal["lora", "embedding", "hypernetwork", "vae"]
AUTOMATIC, OWN = "automatic", "none"
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_KEYS = {name: name for name in ("te", "te1", "te2", "unet", "start", "end", "how", "blocks")}
_KEYS |= {"text": "te", "lbw": "blocks"}


class FileSource(Protocol):
    """Finds files by name: the library (`app.sources`), or `PathSource`."""

    def find(self, kind: Kind, name: str, *, paths: bool = True) -> Path:
        """The file called `name`, which may be a path if `paths` is true. Raises RequestError if there is none."""
        ...

    def mentioned(self, texts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        """The embeddings whose names occur in `texts` (`prompting.read_texts`), for text encoders of these widths."""
        ...

    def default_strength(self, path: Path) -> float:
        """The strength of a LoRA for which the user gives none."""
        ...

    def sha256(self, path: Path) -> str: ...


class PathSource:
    """Files by path only."""

    def find(self, kind: Kind, name: str, *, paths: bool = True) -> Path:
        if not paths:
            raise RequestError(kind, f"{printable(name)} stands in a prompt, where only names of the library are read")
        path = Path(name).expanduser()
        if not os.path.exists(path):  # noqa: PTH110  # False for what is no possible path
            raise RequestError(kind, f"there is no file {printable(name)}")
        return path

    def mentioned(self, texts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        return {}

    def default_strength(self, path: Path) -> float:
        return 1.0

    def sha256(self, path: Path) -> str:
        return sha256_of(path)


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA or hypernetwork as a user writes it. `unet` None: its default strength."""

    name: str
    unet: float | None = None
    text: float | Mapping[str, float] | None = None
    start: float = 0.0
    end: float = 1.0
    how: How | None = None
    blocks: str | None = None


def read_spec(setting: str, text: str) -> AdapterSpec:
    """Parse `text`; a name may contain colons, as Windows paths do. Raises RequestError."""
    parts = text.split(":")
    values: dict[str, str] = {}
    numbers: list[str] = []
    while len(parts) > 1:
        key, sign, value = parts[-1].strip().partition("=")
        if sign and key.strip().lower() in _KEYS:
            values[_KEYS[key.strip().lower()]] = value.strip()
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
        values = {"te": numbers[0], "unet": numbers[1]} | values
    elif numbers:
        values = {"unet": numbers[0]} | values
    how, blocks = values.pop("how", None), values.pop("blocks", None)
    if how not in (None, "folded", "live"):
        raise RequestError(setting, f"how={printable(how, 20)} is not known; use folded or live")
    given = {key: float(value) if _NUMBER.fullmatch(value) else math.nan for key, value in values.items()}
    for key, number in given.items():
        if not math.isfinite(number):
            raise RequestError(
                setting, f"{printable(text, 80)!r}: {key} is {printable(values[key], 20)!r}, which is not a number"
            )
    start, end = given.get("start", 0.0), given.get("end", 1.0)
    text_strength: float | dict[str, float] | None = given.get("te")
    if "te1" in given or "te2" in given:
        each = {"text_encoder": given.get("te1", given.get("te")), "text_encoder_2": given.get("te2", given.get("te"))}
        text_strength = {name: number for name, number in each.items() if number is not None}
    if not 0 <= start < end <= 1:
        raise RequestError(
            setting, f"{printable(text, 80)!r}: start and end are shares of the steps, 0 <= start < end <= 1"
        )
    return AdapterSpec(name, given.get("unet"), text_strength, start, end, cast("How | None", how), blocks)


@dataclass(frozen=True)
class RequestedFile:
    """An adapter file that a request uses: what it is, where it is from, and `setting`, how the user asked for it.

    `setting` is "" for embeddings found by their name in a prompt.
    """

    kind: Kind
    path: Path
    sha256: str
    setting: str
    use: Use


@dataclass(frozen=True)
class UsedFile:
    """A file that a picture was made with, for the recipe. `attached` None: a VAE."""

    kind: Kind
    path: Path
    sha256: str
    setting: str
    attached: Attached | None = None

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "kind": self.kind,
            "name": self.path.stem,
            "setting": self.setting,
            "path": os.path.abspath(self.path),  # noqa: PTH100  # links are kept
            "sha256": self.sha256,
        }
        if (attached := self.attached) is not None:
            values |= {"form": attached.kind, "matched": attached.matched, "unmatched": len(attached.unmatched)}
            values |= {"wrong_shape": len(attached.wrong_shape)}
            if self.kind != "embedding":
                values |= {"how": attached.how, "strength": attached.strength.to_json()}
        return values

    def __str__(self) -> str:
        """'style [0123456789]: lora, 192 modules, ...'"""
        if self.attached is None:
            return f"{self.path.name} [{self.sha256[:10]}]: VAE"
        return f"{self.attached.name} [{self.sha256[:10]}]: {self.attached.summary}"


def find_adapters(model: Model, request: Request, tags: Iterable[Tag], source: FileSource) -> list[RequestedFile]:
    """The adapter files of one pass: of the request's options, of the `tags` of its prompt, and embeddings by name.

    Nothing is attached. Raises RequestError if a file is not found, FileError if it cannot be opened.
    """
    tags = list(tags)
    blocks = _blocks(request, source)
    found: list[RequestedFile] = []

    def add(kind: Kind, path: Path, setting: str, use: Use) -> None:
        found.append(RequestedFile(kind, path, source.sha256(path), setting, use))

    for text, by_option in _asked(request.lora, tags, "lora", "lyco"):
        spec = read_spec("lora", text)
        path = _find(source, "lora", spec, by_option)
        unet = source.default_strength(path) if spec.unet is None else spec.unet
        by_block = spec.blocks or blocks.get(os.path.realpath(path))
        chosen = strength(unet, spec.text, by_block, spec.start, spec.end, model.unet.spec)
        add("lora", path, text, Use(open_model(path), chosen, spec.how))
    for path in blocks.keys() - {os.path.realpath(each.path) for each in found}:
        raise RequestError("lora_blocks", f"{path} is not a LoRA of this request; name it with lora too")
    for text, by_option in _asked(request.hypernet, tags, "hypernet"):
        spec = read_spec("hypernet", text)
        path = _find(source, "hypernetwork", spec, by_option)
        add("hypernetwork", path, text, Use(open_model(path), Strength(1.0 if spec.unet is None else spec.unet)))
    texts = read_texts(request)
    mentioned = source.mentioned(texts, model.text_widths)
    named = {path.stem: (path, name) for name in request.embedding for path in [source.find("embedding", name)]}
    attached = {name for each in model.attached for name in each.embeddings if each.kind == "embedding"}
    # A name inside a longer one, such as `hands` in `bad hands`, is not used.
    mentions = used(texts, dict.fromkeys([*attached, *named, *mentioned]))
    embeddings = {
        name: (path, "") for name, path in mentioned.items() if name in mentions and name not in attached
    } | named
    for name, (path, text) in embeddings.items():
        add("embedding", path, text, Use(open_model(path), name=name))
    return found


def bundled_words(request: Request, tags: Iterable[Tag], source: FileSource) -> list[str]:
    """The words of embeddings that are bundled in the request's LoRAs; of files that cannot be used, none."""
    words = list[str]()
    for text, by_option in _asked(request.lora, list(tags), "lora", "lyco"):
        with suppress(GouacheError):  # which attaching the file will report
            words += bundled(open_model(_find(source, "lora", read_spec("lora", text), by_option)))
    return words


def _find(source: FileSource, kind: Kind, spec: AdapterSpec, by_option: bool) -> Path:
    try:
        return source.find(kind, spec.name, paths=by_option)
    except RequestError:
        keys = [key for key in re.findall(r":\s*([A-Za-z]\w*)\s*=", spec.name) if key.lower() not in _KEYS]
        if not keys:
            raise
        unknown = ", ".join(printable(key, 40) for key in keys)
        raise RequestError(
            kind, f"{printable(spec.name, 80)}: {unknown} is not known here; the keys are {', '.join(sorted(_KEYS))}"
        ) from None


def _asked(options: Sequence[str], tags: Sequence[Tag], *kinds: str) -> Iterator[tuple[str, bool]]:
    """(text, whether it is an option). Prompts are often copied from strangers: their tags name files, by no path."""
    yield from ((text, True) for text in options)
    yield from ((tag.argument, False) for tag in tags if tag.kind in kinds)


def find_vae(model: Model, name: str | None, source: FileSource) -> tuple[AnyVae, ModelFile | None] | None:
    """The autoencoder that a request names, loaded, and its file; None if it is the one the model has.

    "none" is the checkpoint's own. Raises ModelError if its latents are not those of the model.
    """
    if name is None or name.lower() == AUTOMATIC:
        return None
    own = name.lower() == OWN
    path = model.file.path if own else source.find("vae", name)
    now = model.file.path if model.vae_file is None else model.vae_file.path
    if now == path:
        return None
    file = model.file if own else open_model(path)
    with torch.inference_mode(False):
        vae = load_vae(file, model.found if own else identify(file), model.device, model.dtype)
    check_compatible(path, vae, model.vae)
    return vae, None if own else file


def used_files(
    model: Model, adapters: Sequence[RequestedFile], attached: Sequence[Attached], request: Request, source: FileSource
) -> list[UsedFile]:
    """The record of what is attached now: by the caller, by the request (`adapters`, as `attached`), and the VAE."""
    by_caller = [each for each in model.attached if not any(each is other for other in attached)]
    used = [_by_caller(each, source) for each in by_caller]
    used += [UsedFile(each.kind, each.path, each.sha256, each.setting, on) for each, on in zip(adapters, attached)]
    if model.vae_file is not None:
        path = model.vae_file.path
        used.append(UsedFile("vae", path, source.sha256(path), request.vae or ""))
    return used


def _by_caller(attached: Attached, source: FileSource) -> UsedFile:
    kinds: dict[str, Kind] = {"embedding": "embedding", "hypernetwork": "hypernetwork"}
    path = attached.file.path
    return UsedFile(kinds.get(attached.kind, "lora"), path, source.sha256(path), "", attached)


def _blocks(request: Request, source: FileSource) -> dict[str, str]:
    """{LoRA: its block weights} of the settings "NAME=PRESET"."""
    found: dict[str, str] = {}
    for text in request.lora_blocks:
        name, sign, weights = text.partition("=")
        if not sign or not name.strip() or not weights.strip():
            raise RequestError("lora_blocks", f"{printable(text, 80)!r} is not NAME=PRESET or NAME=NUMBERS")
        found[os.path.realpath(source.find("lora", name.strip()))] = weights.strip()
    return found
