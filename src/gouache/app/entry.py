"""A model of the library: data from its header, from sidecar files, from the user, and from published facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from gouache.app.categories import category
from gouache.app.known_models import KnownModel, find_by_file
from gouache.app.sidecars import Sidecar
from gouache.errors import FileError, RequestError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.adapters import read_adapter
from gouache.workshop.details import trigger_words

USES = ("official", "anime", "realistic", "2.5D", "illustration", "inpainting", "video", "general")
MAX_WEIGHT = 10.0


@dataclass(frozen=True)
class About:
    """What the user noted about a model; "", () or None where nothing. `use` is one of USES.

    `source`: where it was installed from. `vae`: the path of the VAE to paint it with.
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
            raise RequestError("use", f"{printable(self.use, 60)!r} is not known; use one of {', '.join(USES)}")
        if self.weight is not None and not -MAX_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise RequestError("weight", f"{self.weight:g} is outside {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")


@dataclass(frozen=True)
class Entry:
    """A model of the library.

    `kind` and `family` are from `identify`. `error` is why the file cannot be opened, or "". `sha256` is "" until it
    is computed. `folder_category` is what its folder is meant for, or "". `about` is the user's own notes; `details`
    combines them with all other sources.
    """

    path: Path
    names: tuple[str, ...]
    size: int
    folder_category: str
    kind: str
    family: str
    facts: dict[str, Any]
    sidecar: Sidecar
    about: About
    error: str
    sha256: str
    missing: bool
    added: datetime

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def category(self) -> str:
        return category(self.kind) if self.kind not in ("", "unknown") else self.folder_category or "unknown"

    @property
    def known(self) -> KnownModel | None:
        """The published model that this is, by its hash or file name."""
        return find_by_file(self.path.name, self.sha256)

    @property
    def details(self) -> About:
        """Each value from the first source that has it: the user, the sidecar files, the header, published facts."""
        own, sidecar, header, published = self.about, self.sidecar, self.facts, self.known
        return About(
            title=own.title or sidecar.title or header.get("title", ""),
            tags=tuple(dict.fromkeys((*own.tags, *sidecar.tags))),
            notes=own.notes or sidecar.notes,
            trigger_words=own.trigger_words or sidecar.trigger_words or tuple(header.get("trigger_words", ())),
            negative=own.negative or sidecar.negative,
            weight=own.weight if own.weight is not None else sidecar.weight,
            base=own.base or sidecar.base or header.get("base", ""),
            use=own.use or (published.use if published and published.use in USES else ""),
            source=own.source or sidecar.source or (published.source if published else ""),
            vae=own.vae,
        )

    def to_json(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)} | {"category": self.category}
        details = {**asdict(self.details), "description": self.sidecar.description or self.facts.get("description", "")}
        return {**values, **details, "path": str(self.path), "added": self.added.isoformat(),
                "sidecar": asdict(self.sidecar), "about": asdict(self.about)}  # fmt: skip


def read_header(path: Path) -> tuple[str, str, dict[str, Any], str]:
    """(kind, family, facts, error) from a file's header."""
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
    metadata = {key: printable(value, 400) for key, value in file.metadata.items()}
    yield "title", metadata.get("modelspec.title") or metadata.get("ss_output_name")
    yield "description", metadata.get("modelspec.description")
    yield "licence", metadata.get("modelspec.license")
    yield "author", metadata.get("modelspec.author")
    yield "base", metadata.get("ss_base_model_version") or metadata.get("ss_sd_model_name")
    if (
        read_adapter({name: info.shape for name, info in file.tensors.items()}) is not None
        or "modelspec.trigger_phrase" in metadata
    ):
        yield "trigger_words", trigger_words(file.metadata)
