"""`gouache hash`, `gouache metadata`, `gouache diff`: what is in a file, and what of it can be changed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def hash_(
    files: Annotated[list[str], Argument(metavar="FILE...", help="Files or model names.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON, an object a file.")] = False,
) -> None:
    """Print the hashes by which sites and programs know a file: SHA-256, AutoV1, AutoV2, AutoV3, CRC32."""
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
            print(json.dumps({"path": str(path), **asdict(found)}))
            continue
        print(path)
        for kind, digest in asdict(found).items():
            print(f"  {kind:8} {digest or '- (no safetensors file)'}")


def metadata(
    file: Annotated[str, Argument(help="A .safetensors file, or a model's name.", show_default=False)],
    put: Annotated[
        list[str] | None, Option("--set", help="KEY=VALUE; may be given several times.", show_default=False)
    ] = None,
    unset: Annotated[
        list[str] | None, Option(help="A KEY to remove; may be given several times.", show_default=False)
    ] = None,
    thumbnail: Annotated[Path | None, Option(help="A picture to show in browsers of models.")] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Where to write.", show_default="in place of FILE")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the text in a file's header, or change it. Weights, and hashes of the weights alone, stay as they are."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.pairs import pairs
    from gouache.files.open import open_model
    from gouache.workshop.metadata import change

    path = resolve(file, read())
    texts = pairs("set", put or [])
    if texts or unset or thumbnail:
        texts = change(path, output or path, texts, unset or [], thumbnail)
    else:
        texts = dict(open_model(path).metadata)
    if as_json:
        print(json.dumps(texts, ensure_ascii=False))
        return
    from gouache.errors import printable

    for key, value in sorted(texts.items()):
        print(f"{printable(key)}: {printable(value)}")
    if not texts:
        print(f"{path} has no metadata")


def diff(
    a: Annotated[str, Argument(help="A file, folder or model name.", show_default=False)],
    b: Annotated[str, Argument(help="Another.", show_default=False)],
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what two models differ in: names, shapes, dtypes, values. Exit code 1 if their weights differ."""
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.files.open import open_model
    from gouache.workshop.convert import progress
    from gouache.workshop.diff import diff as service

    settings = read()
    first, second = (open_model(resolve(each, settings)) for each in (a, b))
    with bytes_bar() as bar:
        found = service(first, second, progress("comparing", first.nbytes, bar.show))
    if as_json:
        print(json.dumps({"equal": found.equal, **asdict(found)}))
    else:
        for title, lines in (
            ("only in the first", found.only_a), ("only in the second", found.only_b),
            ("of another shape", found.shapes), ("of another dtype", found.dtypes), ("metadata", found.metadata),
        ):  # fmt: skip
            if lines:
                more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
                print(f"{title} ({len(lines)}): {'; '.join(lines[:5])}{more}")
        for part in found.parts:
            how = "equal" if part.same == part.tensors else f"{part.relative:.3g} apart, relative to the first"
            print(f"{part.name:16} {part.same} of {part.tensors} tensors equal; {how}")
        for each in found.furthest:
            print(f"  {each.name}: {each.relative:.3g} apart, one number by {each.largest:.3g}")
        print("the weights are equal" if found.equal else "the weights differ")
    if not found.equal:
        sys.exit(1)
