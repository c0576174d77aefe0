"""A model of the library: what its header tells, what lies beside it, what the user said, what is publicly known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from gouache.app.kinds import shelf
from gouache.app.known import Known, of_file
from gouache.app.sidecars import Sidecar
from gouache.errors import FileError, RequestError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.adapters import read_adapter
from gouache.workshop.details import trigger_words

USES = ("official", "anime", "realistic", "2.5D", "illustration", "inpainting", "video", "general")
MOST_WEIGHT = 10.0


@dataclass(frozen=True)
class About:
    """What the user said of a model; "" or () or None where nothing. `use` is one of USES.

    `source` is where it was installed from, `vae` the path of the autoencoder to paint it with.
    """

    title: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""
    trigger_words: tuple[str, ...] = ()
    negative: str = ""
    weight: float | None = None
    base: str = ""
    use: str = ""
    source: str = ""
    vae: str = ""

    def __post_init__(self) -> None:
        if self.use not in ("", *USES):
            raise RequestError("use", f"{printable(self.use, 60)!r} is none of {', '.join(USES)}")
        if self.weight is not None and not -MOST_WEIGHT <= self.weight <= MOST_WEIGHT:
            raise RequestError("weight", f"{self.weight:g} is outside {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}")


@dataclass(frozen=True)
class Entry:
    """A model of the library.

    `kind` and `family` as `identify` says; `trouble` is why it could not be opened, "" if it could. `said` is what the
    user said over what lies beside the file over what its header says over what is publicly known. `sha256` is ""
    until it was computed.
    """

    path: Path
    names: tuple[str, ...]
    size: int
    place: str
    kind: str
    family: str
    facts: dict[str, Any]
    sidecar: Sidecar
    about: About
    trouble: str
    sha256: str
    missing: bool
    added: datetime

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shelf(self) -> str:
        """The kind it is sorted under."""
        return shelf(self.kind) if self.kind not in ("", "unknown") else self.place or "unknown"

    @property
    def known(self) -> Known | None:
        """What is publicly known of it, by its hash or its file's name."""
        return of_file(self.path.name, self.sha256)

    @property
    def said(self) -> About:
        own, beside, inside, published = self.about, self.sidecar, self.facts, self.known
        return About(
            title=own.title or beside.title or inside.get("title", ""),
            tags=tuple(dict.fromkeys((*own.tags, *beside.tags))),
            notes=own.notes or beside.notes,
            trigger_words=own.trigger_words or beside.trigger_words or tuple(inside.get("trigger_words", ())),
            negative=own.negative or beside.negative,
            weight=own.weight if own.weight is not None else beside.weight,
            base=own.base or beside.base or inside.get("base", ""),
            use=own.use or (published.use if published and published.use in USES else ""),
            source=own.source or beside.source or (published.source if published else ""),
            vae=own.vae,
        )

    def to_json(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)} | {"shelf": self.shelf}
        said = {**asdict(self.said), "description": self.sidecar.description or self.facts.get("description", "")}
        return {**values, **said, "path": str(self.path), "added": self.added.isoformat(),
                "sidecar": asdict(self.sidecar), "about": asdict(self.about)}  # fmt: skip


def header(path: Path) -> tuple[str, str, dict[str, Any], str]:
    """(kind, family, facts, trouble) from a file's header."""
    try:
        file = open_model(path)
        found = identify(file)
    except FileError as error:
        return "", "", {}, printable(str(error), 400)
    family = found.family.value
    facts = {name: value for name, value in _facts(file, found) if value not in (None, "", [], ())}
    return found.kind.value, family.name if family else "", facts, ""


def _facts(file: ModelFile, found: Found) -> Iterator[tuple[str, Any]]:
    yield "format", file.format
    yield "variant", found.variant.value
    yield "prediction", found.prediction.value if found.prediction else None
    yield "resolution", list(found.size.value) if found.size else None
    yield "components", list(found.components)
    yield "missing", list(found.missing)
    yield "dtypes", sorted({info.dtype for info in file.tensors.values()})
    said = {key: printable(value, 400) for key, value in file.metadata.items()}
    yield "title", said.get("modelspec.title") or said.get("ss_output_name")
    yield "description", said.get("modelspec.description")
    yield "licence", said.get("modelspec.license")
    yield "author", said.get("modelspec.author")
    yield "base", said.get("ss_base_model_version") or said.get("ss_sd_model_name")
    if (
        read_adapter({name: info.shape for name, info in file.tensors.items()}) is not None
        or "modelspec.trigger_phrase" in said
    ):
        yield "trigger_words", trigger_words(file.metadata)
