"""`gouache models list|add|remove|show|set|find|verify|install`: the library of models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from gouache.cli.models_page import known_page, page, table
from gouache.errors import GouacheError, RequestError, printable
from gouache.files.source import size_text
from gouache.outside import json_line
from gouache.wording import plural

if TYPE_CHECKING:
    from gouache.app.entry import Entry
    from gouache.app.library import Changes, Library
    from gouache.app.settings import Settings

app = Typer(help="List, describe, check and install models.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Name = Annotated[str, Argument(help="A name, folder/name, name [hash], or path.", show_default=False)]


@app.command("list")
def list_(
    kind: Annotated[str, Option(help="Only checkpoint, vae, lora, embedding, hypernetwork, controlnet, ...")] = "",
    family: Annotated[str, Option(help="Only sd1, sd2, sdxl, ...")] = "",
    tag: Annotated[str, Option(help="Only models with this tag.")] = "",
    missing: Annotated[bool, Option("--missing", help="Models whose files no longer exist.")] = False,
    long: Annotated[bool, Option("--long", help="Also the date when it was added, and the path.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the models in all folders. Each with data from its header and your notes."""
    with _library() as (library, settings):
        _refresh(library, quiet=as_json)
        table(library.entries(kind, family, tag, missing), as_json, long)
        if not as_json:
            print(f"searched {', '.join(printable(str(each)) for each in settings.models)}", file=sys.stderr)


@app.command()
def add(
    paths: Annotated[
        list[Path],
        Argument(
            metavar="PATH...",
            help="Folders, model files, A1111 or ComfyUI installations, or extra_model_paths.yaml.",
            readable=False,  # reported by the service
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Add folders or files to the library. Nothing is copied."""
    from gouache.app import folders, search_paths
    from gouache.app.settings import read

    settings = read()
    for path in paths:
        if path.suffix.lower() in (".yaml", ".yml"):
            search_paths.search_folders(path)  # one that cannot be read is refused before it is added
    new = [folders.add(settings.data, path) for path in paths]
    with _library() as (library, _):
        changes = _refresh(library, quiet=True)
        if as_json:
            print(json_line({"added": sum(new), "new": [str(path) for path in changes.new]}))
        else:
            for path, fresh in zip(paths, new):
                print(f"{printable(str(path))}: {'added' if fresh else 'was added before'}")
            print(f"{plural(len(changes.new), 'new model')} in the library")
        _hash_in_background(library, quiet=as_json)


@app.command()
def remove(
    name: Annotated[str, Argument(help="A path that was added, or a model.", show_default=False)],
    delete: Annotated[
        bool, Option("--delete", help="Delete the model's file and the metadata files next to it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a path from the library, or delete a model. Your notes are kept in both cases."""
    from gouache.app import folders
    from gouache.app.settings import read

    settings = read()
    if folders.remove(settings.data, Path(name)):
        _forget_gone(as_json, name)
        return
    with _library() as (library, _):
        _refresh(library, quiet=True)
        entry = _entry(library, name, settings)
        if library.entry(entry.path) is None:  # never delete another file or folder
            raise RequestError(
                "name", f"{printable(name)} is not in the library; `gouache models list` lists its models"
            )
        deleted = list[str]()
        if delete:
            deleted = _delete(entry)
            library.forget([entry.path])
        elif not folders.remove(settings.data, entry.path):
            raise RequestError("name", _how_to_remove(entry.path, folders.added(settings.data)))
    if not delete:  # the file itself was added, and is called by its name
        _forget_gone(as_json, str(entry.path))
        return
    _print(as_json, f"deleted {', '.join(map(printable, deleted))}", removed=str(entry.path), deleted=deleted)


def _forget_gone(as_json: bool, removed: str) -> None:
    """Forget the files that are in no folder of the library any more, after a path was removed from its list."""
    with _library() as (library, _):
        changes = _refresh(library, quiet=True)
        library.forget(changes.gone)
    line = f"{printable(removed)} was removed from the library; no file was deleted"
    _print(as_json, line, removed=removed, deleted=[])


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show all details of a model. It is one in the library, or a well-known published one."""
    from gouache.app.known_models import find_by_name, similar_names

    with _library() as (library, settings):
        _refresh(library, quiet=True)
        published = find_by_name(name)
        try:
            entry = _entry(library, name, settings)
        except RequestError:
            if published is None:
                if near := similar_names(name):
                    message = f"there is no model {printable(name)!r}; similar well-known models: {', '.join(near)}"
                    raise RequestError("model", message) from None
                raise
            entry = None
        if entry is not None:
            published = entry.known or published
        if as_json:
            values = entry.to_json() if entry is not None else {}
            print(json_line(values | {"known": asdict(published) if published else None}))
        else:
            if entry is not None:
                print("\n".join(page(entry)))
            if published is not None:
                print("\n".join(known_page(published)))


@app.command("set")
def set_(
    name: Name,
    tag: Annotated[list[str] | None, Option(help="A tag to add; may be repeated.")] = None,
    untag: Annotated[list[str] | None, Option(help="A tag to remove; may be repeated.")] = None,
    notes: Annotated[str | None, Option(help="Notes; they replace the former ones.")] = None,
    weight: Annotated[float | None, Option(help="The strength to use when none is given.")] = None,
    trigger: Annotated[list[str] | None, Option(help="Trigger words; they replace the former ones.")] = None,
    negative: Annotated[str | None, Option(help="A recommended negative prompt.")] = None,
    base: Annotated[str | None, Option(help="The base model that it is made for.")] = None,
    use: Annotated[str | None, Option(help="official, anime, realistic, 2.5D, illustration, ...")] = None,
    title: Annotated[str | None, Option(help="A title.")] = None,
    vae: Annotated[
        str | None, Option(help="The VAE to paint it with: a file or name; '' for the model's own VAE.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set notes about a model. They are stored by its hash and so kept when the file is moved or renamed."""
    with _library() as (library, settings):
        _refresh(library, quiet=True)
        entry = _entry(library, name, settings)
        given = dict(notes=notes, weight=weight, negative=negative, base=base, use=use, title=title)  # noqa: C408
        values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if vae is not None:
            from gouache.app.names import resolve

            values["vae"] = os.path.realpath(resolve(vae, settings, "vae")) if vae else ""
        if trigger is not None:
            values["trigger_words"] = tuple(filter(None, trigger))
        if not (values or tag or untag):
            raise RequestError("set", "nothing to set; give --tag, --notes, --weight, --trigger, --use, ...")
        entry = library.describe(entry.path, add_tags=tag or (), remove_tags=untag or (), **values)
    print(json_line(entry.to_json()) if as_json else "\n".join(page(entry)))


@app.command()
def find(
    words: Annotated[
        list[str], Argument(help="Every word must occur in a name, tag, note or trigger word.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Find models by words.

    They are searched in names, titles, tags, notes, descriptions and trigger words. Exit code 1 if none is found.
    """
    with _library() as (library, _):
        _refresh(library, quiet=as_json)
        found = library.find(" ".join(words))
        table(found, as_json)
    if not found:
        sys.exit(1)


@app.command()
def verify(
    names: Annotated[list[str] | None, Argument(help="Models; all if none is given.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Compare model files with their recorded hashes. Exit code 1 if one differs or cannot be opened."""
    from gouache.app.verify import verify as service
    from gouache.cli.progress import bytes_bar

    with _library() as (library, settings):
        _refresh(library, quiet=True)
        entries = [_entry(library, name, settings) for name in names] if names else library.entries()
        bad = 0
        for entry in entries:
            with bytes_bar() as bar:
                found = service(entry, library, bar.show)
            bad += not found.good
            if as_json:
                print(json_line(asdict(found)), flush=True)
            else:
                reason = found.reason.removeprefix(f"{found.path}: ")  # an error of the file begins with its path
                print(f"{'good' if found.good else 'BAD':4}  {found.path}: {reason}", flush=True)
        if not as_json:
            print(f"{plural(len(entries), 'model')}, {bad} bad")
    if bad:
        sys.exit(1)


@app.command()
def install(
    source: Annotated[
        str,
        Argument(help="A file, a URL, or a Hugging Face repository: ORG/NAME[@REVISION][/FILE].", show_default=False),
    ],
    kind: Annotated[str, Option(help="Its category, if the content does not show it.")] = "",
    name: Annotated[str, Option(help="The name of the installed file.")] = "",
    sha256: Annotated[str, Option(help="The expected hash.")] = "",
    token: Annotated[str, Option(envvar="GOUACHE_TOKEN", help="A login token for the site.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Download, check, scan and install a model. After an interruption the same command resumes the download."""
    from gouache.app.install import install as service
    from gouache.cli.progress import bytes_bar

    with _library() as (library, settings):
        with bytes_bar() as bar:
            done = service(source, settings, kind=kind, name=name, sha256=sha256, token=token, on_work=bar.show)
        library.refresh()
        entry = library.describe(done.path, source=done.source)
    if as_json:
        print(json_line({**asdict(done), "path": str(done.path)}))
    else:
        how = "already installed" if done.already else "installed"
        print(f"{printable(str(done.path))}: {how}; {done.kind}, {size_text(done.size)}")
        print(f"sha256 {done.sha256}; its name is {entry.name!r}")


@contextmanager
def _library() -> Iterator[tuple[Library, Settings]]:
    from gouache.app.library import Library
    from gouache.app.settings import read

    settings = read()
    with Library.of(settings) as library:
        yield library, settings


def _refresh(library: Library, quiet: bool) -> Changes:
    """Update the library with a progress bar; unless `quiet`, report moved files."""
    from gouache.cli.progress import Bar

    with Bar() as bar:
        changes = library.refresh(bar.show)
    if not quiet:
        for before, now in changes.moved:
            print(f"note: {printable(str(before))} was moved to {printable(str(now))} (same hash)", file=sys.stderr)
    return changes


def _hash_in_background(library: Library, quiet: bool) -> None:
    """Start a process that hashes the files that have no hash yet."""
    from gouache.app import indexing

    files, size = library.unhashed
    if files and indexing.start() and not quiet:
        print(f"note: hashing {plural(files, 'file')} ({size_text(size)}) in the background", file=sys.stderr)


def _entry(library: Library, name: str, settings: Settings) -> Entry:
    """The model with that name or path; of a path outside the library's folders, an entry from its header."""
    from gouache.app.names import resolve

    path = resolve(name, settings)
    return library.entry(path) or library.entry(path.absolute()) or library.read_entry(path.absolute())


def _how_to_remove(path: Path, added: list[Path]) -> str:
    """What to do about `models remove` with a model instead of a path that was added."""
    source = next((each for each in added if each in path.parents), None)
    shown = printable(str(path))
    if source is not None:
        return f"{shown} is in {source}, which was added; `gouache models remove {source}` takes that off the list"
    return f"{shown} is in one of the library's folders; move it elsewhere, or delete the file for good with --delete"


def _delete(entry: Entry) -> list[str]:
    """Delete a model and its sidecar files; their paths."""
    import shutil

    try:
        shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
        deleted = [str(entry.path)]
        for file in () if entry.sidecar.left_at else entry.sidecar.files:
            sidecar = entry.path.with_name(file)
            sidecar.unlink(missing_ok=True)
            deleted.append(str(sidecar))
    except OSError as error:
        raise GouacheError(f"{printable(str(entry.path))}: cannot be deleted: {error.strerror}") from None
    return deleted


def _print(as_json: bool, line: str, **values: object) -> None:
    print(json_line(values) if as_json else line)
