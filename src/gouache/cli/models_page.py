"""Models of the library in words: a line each, or a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gouache.errors import printable
from gouache.files.source import size_text

if TYPE_CHECKING:
    from gouache.app.entry import Entry
    from gouache.app.known import Known


def table(entries: list[Entry], as_json: bool) -> None:
    if as_json:
        print(json.dumps([each.to_json() for each in entries], ensure_ascii=False))
        return
    wide = min(48, max((len(each.name) for each in entries), default=0))
    for each in entries:
        said = each.said
        notes = [said.use, *said.tags, f"cannot be opened: {each.trouble}" if each.trouble else ""]
        family = each.family or "-"
        told = ", ".join(filter(None, notes))
        columns = (
            each.shelf.ljust(12),
            family.ljust(8),
            size_text(each.size).rjust(8),
            each.sha256[:10].ljust(10),
            told,
        )
        print("  ".join((printable(each.name).ljust(wide), *columns)).rstrip())
    print(f"{len(entries)} models", file=sys.stderr)


def page(entry: Entry) -> Iterator[str]:
    said, facts = entry.said, entry.facts
    astray = entry.place and entry.place != entry.shelf
    yield f"{entry.path}  ({size_text(entry.size)}{', missing' if entry.missing else ''})"
    lines = {
        "names": ", ".join(entry.names),
        "title": said.title,
        "kind": f"{entry.kind or 'unknown'}{f', in a folder for {entry.place}' if astray else ''}",
        "family": entry.family,
        "variant": facts.get("variant"),
        "prediction": facts.get("prediction"),
        "size": "x".join(map(str, facts.get("resolution", ()))),
        "parts": ", ".join(facts.get("components", ())),
        "missing": ", ".join(facts.get("missing", ())),
        "dtypes": ", ".join(facts.get("dtypes", ())),
        "use": said.use,
        "base": said.base,
        "tags": ", ".join(said.tags),
        "trigger words": ", ".join(said.trigger_words),
        "negative": said.negative,
        "own VAE": said.vae,
        "weight": "" if said.weight is None else f"{said.weight:g}",
        "notes": said.notes,
        "description": entry.sidecar.description or facts.get("description"),
        "author": facts.get("author"),
        "licence": facts.get("licence"),
        "source": said.source,
        "preview": entry.sidecar.preview,
        "config": entry.sidecar.config,
        "beside it": ", ".join(entry.sidecar.files),
        "sha256": entry.sha256 or "not computed yet",
        "note": _doubt(entry),
        "trouble": entry.trouble,
    }
    yield from _aligned(lines)


def _doubt(entry: Entry) -> str:
    """Where a file is called like a published one, and is another."""
    from gouache.app.known import called, differs

    name = entry.path.name
    like = called(name)
    if like is None or not differs(like, name, entry.sha256):
        return ""
    return f"called like the published file of {like.name}, and has another hash: this is something else"


def known_page(known: Known) -> Iterator[str]:
    yield f"{known.name}, as publicly known"
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
            "evidence": f"{len(known.evidence)} sources, listed with --json",
        }
    )


def _aligned(lines: dict[str, object]) -> Iterator[str]:
    for name, value in lines.items():
        if value:
            first, *rest = str(value).splitlines()
            yield f"  {name:14} {printable(first, 1000)}"
            yield from (f"  {'':14} {printable(line, 1000)}" for line in rest)
