"""`gouache hash`, `gouache metadata`, `gouache diff`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.cli.text import shown
from gouache.outside import json_line
from gouache.wording import plural


def hash_(
    files: Annotated[list[str], Argument(metavar="FILE...", help="Files or model names.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON, one object per file.")] = False,
) -> None:
    """Print a file's hashes: SHA-256, AutoV1, AutoV2, AutoV3, CRC32."""
    from gouache.app.hashes import hashes
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar

    settings = read()
    for name in files:
        path = resolve(name, settings)
        with bytes_bar() as bar:
            found = hashes(path, settings, bar.show)
        if as_json:
            print(json_line({"path": str(path), **asdict(found)}))
            continue
        print(shown(path))
        for kind, digest in asdict(found).items():
            print(f"  {kind:8} {digest or '- (only for .safetensors files)'}")


def metadata(
    file: Annotated[str, Argument(help="A .safetensors file, or a model's name.", show_default=False)],
    put: Annotated[
        list[str] | None, Option("--set", help="Metadata to set as KEY=VALUE; can be repeated.", show_default=False)
    ] = None,
    unset: Annotated[
        list[str] | None, Option(help="A key to remove, KEY; can be repeated.", show_default=False)
    ] = None,
    thumbnail: Annotated[
        Path | None, Option(help="A picture to embed as thumbnail for model browsers.", readable=False)
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="The file to write.", readable=False, show_default="FILE itself")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file of --output if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show or change the metadata in a file's header. Weights, and hashes of the weights alone, do not change."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.pairs import pairs
    from gouache.files.open import open_model
    from gouache.workshop.metadata import change

    path = resolve(file, read())
    texts = pairs("set", put or [])
    if texts or unset or thumbnail:
        saved, texts = change(path, output, texts, unset or [], thumbnail, overwrite=overwrite)
        link = f", which {shown(path)} is a link to" if output is None and saved != path else ""
        print(f"saved in {shown(saved)}{link}", file=sys.stderr)
    else:
        texts = dict(open_model(path).metadata)
    if as_json:
        print(json_line(texts))
        return
    from gouache.errors import printable

    for key, value in sorted(texts.items()):
        print(f"{printable(key)}: {printable(value)}")
    if not texts:
        print(f"{shown(path)} has no metadata")


def diff(
    a: Annotated[str, Argument(help="A file, folder or model name.", show_default=False)],
    b: Annotated[str, Argument(help="Another.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the weights of two models, in any layouts. Lists names, shapes, dtypes and values that differ.

    Exit code 1 if weights differ.
    """
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.workshop.diff import diff as service
    from gouache.workshop.diff import open_both
    from gouache.workshop.progress import progress

    settings = read()
    first, second = open_both(resolve(a, settings), resolve(b, settings))
    with bytes_bar() as bar:
        found = service(first, second, progress("comparing", first.nbytes, bar.show))
    if as_json:
        print(json_line({"equal": found.equal, **asdict(found)}))
    else:
        for title, lines in (
            ("only in the first", found.only_a), ("only in the second", found.only_b),
            ("different shape", found.shapes), ("different dtype", found.dtypes),
            ("different metadata", found.metadata),
        ):  # fmt: skip
            if lines:
                more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
                print(f"{title} ({len(lines)}): {'; '.join(lines[:5])}{more}")
        for part in found.parts:
            line = f"{part.name:16} {part.same} of {plural(part.tensors, 'tensor')} equal"
            print(line if part.same == part.tensors else f"{line}; relative difference {part.relative:.3g}")
        for each in found.furthest:
            print(f"  {each.name}: relative difference {each.relative:.3g}, largest difference {each.largest:.3g}")
        if found.equal:
            print("the weights are equal")
        elif not found.parts and not found.shapes:
            print("the models have no component and no tensor name in common")
        elif all(part.same == part.tensors for part in found.parts):
            print("the weights with the same name and shape are equal")
        else:
            print("the weights differ")
    if not found.equal:
        sys.exit(1)
