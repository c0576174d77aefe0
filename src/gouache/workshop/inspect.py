"""A report on a model file, to be printed or written as JSON: the results of `families.identify` with sizes, details
and advice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gouache.errors import FileError, printable
from gouache.families.found import Fact, Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.layouts.nearest import nearest
from gouache.outside import parse_json, read_outside
from gouache.workshop import layout
from gouache.workshop.advice import advice
from gouache.workshop.damage import Fault, faults, fingerprints
from gouache.workshop.details import Detail, details, finite
from gouache.workshop.hashes import Hashes, hashes
from gouache.workshop.progress import OnWork, progress

_LONGEST = 4096  # characters of a path
_MOST_NEAREST = 20  # unknown names for which a similar one is searched


@dataclass(frozen=True)
class Statement:
    """A named fact as text, with its confidence and evidence."""

    name: str
    value: str
    confidence: str
    evidence: str


@dataclass(frozen=True)
class Part:
    """A complete component: its number of parameters, and the dtype of most of its tensors."""

    name: str
    parameters: int
    dtype: str
    layout: str
    evidence: str
    fingerprint: str = ""


@dataclass(frozen=True)
class Report:
    """`size` is in bytes; `leftovers` maps each reason to names of tensors; `unknown` maps each name that no component
    has to the most similar known name.

    `outside` are those of the unknown ones that are not inside a component, so that painting ignores them. `faults`,
    `hashes` and the fingerprints of the components are only in deep reports, `keys` only when requested.
    """

    path: str
    format: str
    size: int
    count: int
    facts: tuple[Statement, ...]
    details: tuple[Detail, ...]
    components: tuple[Part, ...]
    missing: Mapping[str, str]
    leftovers: Mapping[str, list[str]]
    unknown: Mapping[str, str]
    outside: tuple[str, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    faults: tuple[Fault, ...] | None = None
    hashes: Hashes | None = None
    keys: Mapping[str, str] | None = None
    file: ModelFile | None = field(default=None, repr=False, compare=False)
    found: Found | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values for JSON, with `facts` by name."""
        values = {name: value for name, value in vars(self).items() if name not in ("file", "found")}
        plain: dict[str, Any] = {name: _plain(value) for name, value in values.items()}
        plain["facts"] = {each.pop("name"): each for each in plain["facts"]}
        return plain


def report(
    path: Path,
    *,
    prediction: str | None = None,
    family: str | None = None,
    keys: bool = False,
    deep: bool = False,
    on_work: OnWork | None = None,
) -> Report:
    """Open `path` and report what it is. `keys` lists every tensor; `deep` reads the weights, for damage and hashes.

    `prediction` and `family` override what is detected. Raises FileError if the file cannot be read.
    """
    if (training := _training_folder(path)) is not None:
        return training
    file = layout.open_for_report(path)
    found = identify(file, prediction=prediction, family=family)
    leftovers: dict[str, list[str]] = {}
    for name, reason in layout.reasons(found).items():
        leftovers.setdefault(reason, []).append(printable(name))
    prints: dict[str, str] = {}
    damage: tuple[Fault, ...] | None = None
    digests: Hashes | None = None
    if deep:
        damage = tuple(faults(file, found, progress("looking for damage", file.nbytes, on_work)))
        parts = sum(part.parameters for part in _parts(file, found, {}))
        prints = fingerprints(file, found, progress("computing fingerprints", 2 * parts, on_work))
        if path.is_file():
            digests = hashes(path, progress("hashing", path.stat().st_size, on_work))
    return Report(
        path=printable(str(path), _LONGEST),
        format=file.format,
        size=file.nbytes,
        count=len(file),
        facts=tuple(_statements(found)),
        details=tuple(details(file, found)),
        components=tuple(_parts(file, found, prints)),
        missing={printable(name): printable(reason, 400) for name, reason in found.missing.items()},
        leftovers=leftovers,
        unknown=_nearest(file, found),
        outside=tuple(printable(name) for name in sorted(found.outside)),
        metadata={printable(key): printable(value) for key, value in file.metadata.items()},
        notes=tuple(printable(note, 400) for note in file.notes),
        advice=tuple(advice(file, found)),
        faults=damage,
        hashes=digests,
        keys={printable(n): f"{i.dtype} {list(i.shape)}" for n, i in file.tensors.items()} if keys else None,
        file=file,
        found=found,
    )


def files_of(path: Path) -> Iterator[Path]:
    """`path`, or, if it is a folder that is not itself a model, the model files and model folders in it.

    Raises FileError for a folder that cannot be read.
    """
    try:
        if not path.is_dir() or (path / "model_index.json").exists() or _training_folder(path) is not None:
            yield path
            return
        inside = [each for each in sorted(path.iterdir()) if _looks_like_a_model(each)]
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    try:
        open_model(path)
        yield path
    except FileError:
        yield from inside or [path]


def _looks_like_a_model(path: Path) -> bool:
    try:
        if path.is_dir():
            return (path / "model_index.json").exists()
    except OSError:
        return False
    return path.suffix.lower() in (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".pkl")


def _training_folder(path: Path) -> Report | None:
    """A report on a checkpoint folder of Gouache's trainer: weights, EMA weights, optimizer, and state as JSON.

    None for any other folder, also for one whose files have these names and something else in them.
    """
    try:
        state, manifest = (parse_json(read_outside(path / name)) for name in ("state.json", "manifest.json"))
        sizes = {name: _size(entry["bytes"]) for name, entry in manifest["files"].items()}
        settings, step, best = dict(state["settings"]), _size(state["step"]), state.get("best")
    except (FileError, ValueError, KeyError, TypeError, AttributeError):
        return None
    found = [Detail("progress", f"step {step} of {_number(settings.get('steps'))}", "state.json")]
    if (score := finite(best)) is not None:
        found.append(Detail("metrics", f"lowest validation loss {score:g}", "state.json"))
    if "optimizer.safetensors" in sizes:
        found.append(
            Detail("optimizer", f"AdamW, {sizes['optimizer.safetensors'] / 1e6:,.0f} MB", "optimizer.safetensors")
        )
        found.append(Detail("learning rate", _number(settings.get("learning_rate")), "the run's settings"))
    for name, size in sizes.items():
        found.append(Detail(f"file {printable(name, 60)}", f"{size / 1e6:,.1f} MB", "manifest.json"))
    kind = Statement("kind", "training checkpoint", "certain", "a folder with a manifest of Gouache's trainer")
    hints = ("to resume the run, start it again in the parent folder",)
    return Report(
        printable(str(path), _LONGEST), "training checkpoint", sum(sizes.values()), len(sizes), (kind,), tuple(found),
        components=(), missing={}, leftovers={}, unknown={}, outside=(), metadata={}, notes=(), advice=hints,
    )  # fmt: skip


def _size(value: object) -> int:
    """A number of bytes or steps. Raises ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def _number(value: object) -> str:
    number = finite(value)
    return "an unknown number" if number is None else f"{number:.10g}"


def _statements(found: Found) -> list[Statement]:
    family = found.family.value
    facts: list[tuple[str, Fact[Any] | None, str]] = [
        ("kind", found.kind, str(found.kind.value)),
        ("family", found.family, family.name if family else "unknown"),
        ("variant", found.variant, str(found.variant.value or "-")),
    ]
    for name in ("prediction", "zero_snr", "latent_scale", "size", "ema"):
        fact = getattr(found, name)
        if fact is not None:
            facts.append((name, fact, _as_text(fact.value)))
    return [
        Statement(name, printable(value), fact.confidence, printable(fact.evidence, 400))
        for name, fact, value in facts
        if fact
    ]


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parts(file: ModelFile, found: Found, prints: Mapping[str, str]) -> list[Part]:
    parts = list[Part]()
    for each in found.components.values():
        sources = {source for origin in each.origins.values() for source in origin.sources}
        count = sum(math.prod(file.tensors[name].shape) for name in sources)
        evidence = printable(each.evidence, 400)
        parts.append(Part(each.name, count, each.dtype.value, each.layout, evidence, prints.get(each.name, "")))
    return parts


def _nearest(file: ModelFile, found: Found) -> dict[str, str]:
    """Tensor names that no component has, the first of them each with the most similar known name."""
    unknown = set(found.unknown)
    known = [name for name in file if name not in unknown]
    similar = dict.fromkeys((printable(name) for name in found.unknown), "")
    for name in found.unknown[:_MOST_NEAREST]:
        similar[printable(name)] = printable(nearest(name, known))
    return similar


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
