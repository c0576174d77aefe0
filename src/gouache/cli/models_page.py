"""Prints models of the library: one line each, or all details of one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gouache.errors import printable
from gouache.files.source import size_text
from gouache.outside import json_line
from gouache.wording import plural

if TYPE_CHECKING:
    from gouache.app.entry import Entry
    from gouache.app.known_models import KnownModel


def table(entries: list[Entry], as_json: bool, long: bool = False) -> None:
    """One line per model; `long` adds the date when it was added, and the path.

    The names of the columns are for people: they are printed on a terminal, and with `long`.
    """
    if as_json:
        print(json_line([each.to_json() for each in entries]))
        return
    width = min(48, max((len(each.name) for each in entries), default=0))
    if entries and (long or sys.stdout.isatty()):
        print(_row("name", width, "kind", "family", "size", "AutoV2", "added", "path, tags" if long else "tags", long))
    for each in entries:
        details = each.details
        notes = [details.use, *details.tags, f"cannot be opened: {each.error}" if each.error else ""]
        last = [str(each.path), *notes] if long else notes
        print(
            _row(
                each.name, width, each.category, each.family or "-", size_text(each.size), each.sha256[:10],
                f"{each.added:%Y-%m-%d}" if long else "", ", ".join(filter(None, last)), long,
            )
        )  # fmt: skip
    print(plural(len(entries), "model"), file=sys.stderr)


def _row(
    name: str, width: int, kind: str, family: str, size: str, digest: str, added: str, last: str, long: bool
) -> str:
    columns = [name.ljust(width), kind.ljust(12), family.ljust(8), size.rjust(11), digest.ljust(10)]
    return printable("  ".join([*columns, *([added.ljust(10)] if long else []), last]).rstrip(), 5000)


def page(entry: Entry) -> Iterator[str]:
    details, facts = entry.details, entry.facts
    misplaced = entry.folder_category and entry.folder_category != entry.category
    yield f"{printable(str(entry.path), 1000)}  ({size_text(entry.size)}{', missing' if entry.missing else ''})"
    lines = {
        "names": ", ".join(entry.names),
        "title": details.title,
        "kind": f"{entry.kind or 'unknown'}{f', in a folder for {entry.folder_category}' if misplaced else ''}",
        "family": entry.family,
        "variant": facts.get("variant"),
        "prediction": facts.get("prediction"),
        "size": "x".join(map(str, facts.get("resolution", ()))),
        "parts": ", ".join(facts.get("components", ())),
        "missing": ", ".join(facts.get("missing", ())),
        "dtypes": ", ".join(facts.get("dtypes", ())),
        "use": details.use,
        "base": details.base,
        "tags": ", ".join(details.tags),
        "trigger words": ", ".join(details.trigger_words),
        "negative": details.negative,
        "VAE": details.vae,
        "weight": "" if details.weight is None else f"{details.weight:g}",
        "notes": details.notes,
        "description": entry.sidecar.description or facts.get("description"),
        "author": facts.get("author"),
        "licence": facts.get("licence"),
        "source": details.source,
        "preview": entry.sidecar.preview,
        "config": entry.sidecar.config,
        "sidecar files": ", ".join(entry.sidecar.files),
        "sha256": entry.sha256 or "not computed yet",
        "note": _hash_note(entry),
        "error": entry.error,
    }
    yield from _aligned(lines)


def _hash_note(entry: Entry) -> str:
    """A note for a file that has the name of a published one but another hash; else ""."""
    from gouache.app.known_models import find_by_file_name, hash_differs

    name = entry.path.name
    published = find_by_file_name(name)
    if published is None or not hash_differs(published, name, entry.sha256):
        return ""
    return f"has the name of the published file of {published.name}, but another hash: it is a different model"


def known_page(known: KnownModel) -> Iterator[str]:

    yield f"{known.name}, published facts"
    yield from _aligned(
        {
            "family": known.family,
            "use": known.use,
            "prediction": known.prediction,
            "size": "x".join(map(str, known.resolution)),
            "VAE": known.vae,
            "clip skip": "" if known.clip_skip is None else str(known.clip_skip),
            "trigger words": ", ".join(known.trigger),
            "licence": known.licence,
            "source": known.source,
            "files": ", ".join(known.files),
            "note": known.note,
            "evidence": f"{plural(len(known.evidence), 'source')}, listed with --json",
        }
    )


def _aligned(lines: dict[str, object]) -> Iterator[str]:
    for name, value in lines.items():
        if value:
            first, *rest = str(value).splitlines()
            yield f"  {name:14} {printable(first, 1000)}"
            yield from (f"  {'':14} {printable(line, 1000)}" for line in rest)
