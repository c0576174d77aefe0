"""`gouache models list|add|remove|show|set|find|verify|install`: the library."""

from __future__ import annotations

import json
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

if TYPE_CHECKING:
    from gouache.app.entry import Entry
    from gouache.app.library import Changes, Library
    from gouache.app.settings import Settings

app = Typer(help="The models on this machine, and where to get others.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Name = Annotated[str, Argument(help="A name, folder/name, name [hash], or path.", show_default=False)]


@app.command("list")
def list_(
    kind: Annotated[str, Option(help="checkpoint, vae, lora, embedding, hypernetwork, controlnet, ...")] = "",
    family: Annotated[str, Option(help="sd1, sd2, sdxl, ...")] = "",
    tag: Annotated[str, Option(help="One of your tags.")] = "",
    missing: Annotated[bool, Option("--missing", help="Those whose files are gone.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the models in all folders: what each is, from its header, and what is noted of it."""
    with _library() as (library, settings):
        changes = _refresh(library, quiet=as_json)
        table(library.entries(kind, family, tag, missing), as_json)
        if not as_json:
            print(f"in {', '.join(map(str, settings.models))}", file=sys.stderr)
        _go_on(library, changes, quiet=as_json)


@app.command()
def add(
    paths: Annotated[
        list[Path],
        Argument(metavar="PATH...", help="Folders, files, installations of other programs, extra_model_paths.yaml."),
    ],
    as_json: AsJson = False,
) -> None:
    """Have the library look in more places. Nothing is copied."""
    from gouache.app import folders, places
    from gouache.app.settings import read

    settings = read()
    for path in paths:
        if path.suffix.lower() in (".yaml", ".yml"):
            places.places_of(path)  # one that cannot be read is refused before it is on the list
    new = [folders.add(settings.data, path) for path in paths]
    with _library() as (library, _):
        changes = _refresh(library, quiet=True)
        if as_json:
            print(json.dumps({"added": sum(new), "new": [str(path) for path in changes.new]}))
        else:
            for path, fresh in zip(paths, new):
                print(f"{path} {'added' if fresh else 'was added before'}")
            print(f"{len(changes.new)} models are new in the library")
        _go_on(library, changes, quiet=as_json)


@app.command()
def remove(
    name: Annotated[str, Argument(help="A folder that was added, or a model.", show_default=False)],
    delete: Annotated[bool, Option("--delete", help="Delete a model's file, and what lies beside it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take a folder off the list, or delete a model with --delete. Notes on models are kept."""
    from gouache.app import folders
    from gouache.app.settings import read

    settings = read()
    if folders.remove(settings.data, Path(name)):
        with _library() as (library, _):
            changes = _refresh(library, quiet=True)
            library.forget(changes.gone)
        _say(as_json, f"{name} is off the list; its files are where they were", removed=name, deleted=[])
        return
    with _library() as (library, _):
        _refresh(library, quiet=True)
        entry = _entry(library, name, settings)
        if not delete:
            raise RequestError(
                "name", f"{entry.path} is a model's file in one of your folders; to delete the file, add --delete"
            )
        gone = _delete(entry)
        library.forget([entry.path])
    _say(as_json, f"deleted {', '.join(gone)}", removed=str(entry.path), deleted=gone)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Tell all that is known of a model: of one that is here, or of a well-known one."""
    from gouache.app.known import named, nearest

    with _library() as (library, settings):
        changes = _refresh(library, quiet=True)
        published = named(name)
        try:
            entry = _entry(library, name, settings)
        except RequestError:
            if published is None:
                if near := nearest(name):
                    shown = f"there is no model {printable(name)!r}; well known are {', '.join(near)}"
                    raise RequestError("model", shown) from None
                raise
            entry = None
        if entry is not None:
            published = entry.known or published
        if as_json:
            told = entry.to_json() if entry is not None else {}
            print(json.dumps(told | {"known": asdict(published) if published else None}, ensure_ascii=False))
        else:
            if entry is not None:
                print("\n".join(page(entry)))
            if published is not None:
                print("\n".join(known_page(published)))
        _go_on(library, changes, quiet=as_json)


@app.command("set")
def set_(
    name: Name,
    tag: Annotated[list[str] | None, Option(help="A tag to add; may be given several times.")] = None,
    untag: Annotated[list[str] | None, Option(help="A tag to take off.")] = None,
    notes: Annotated[str | None, Option(help="Notes, in place of those there.")] = None,
    weight: Annotated[float | None, Option(help="The strength to use it at when none is given.")] = None,
    trigger: Annotated[list[str] | None, Option(help="Words that call it up, in place of those there.")] = None,
    negative: Annotated[str | None, Option(help="A negative prompt that suits it.")] = None,
    base: Annotated[str | None, Option(help="The model that it is made for.")] = None,
    use: Annotated[str | None, Option(help="official, anime, realistic, 2.5D, illustration, ...")] = None,
    title: Annotated[str | None, Option(help="What to call it in lists.")] = None,
    vae: Annotated[str | None, Option(help="The VAE to paint it with, a file or name; '' for its own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Note something of a model. Kept by its hash, so it follows the file when that is moved or renamed."""
    with _library() as (library, settings):
        _refresh(library, quiet=True)
        entry = _entry(library, name, settings)
        given = dict(notes=notes, weight=weight, negative=negative, base=base, use=use, title=title)  # noqa: C408
        said: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if vae is not None:
            from gouache.app.names import resolve

            said["vae"] = str(resolve(vae, settings, "vae").resolve()) if vae else ""
        if trigger is not None:
            said["trigger_words"] = tuple(filter(None, trigger))
        if tag or untag:
            tags = [each for each in (*entry.about.tags, *(tag or [])) if each not in (untag or [])]
            said["tags"] = tuple(dict.fromkeys(tags))
        if not said:
            raise RequestError("set", "there is nothing to note; give --tag, --notes, --weight, --trigger, --use, ...")
        entry = library.describe(entry.path, **said)
    print(json.dumps(entry.to_json(), ensure_ascii=False) if as_json else "\n".join(page(entry)))


@app.command()
def find(
    words: Annotated[list[str], Argument(help="All of them have to be told somewhere.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Find models by words in their names, titles, tags, notes, descriptions, trigger words. Exit code 1 if none."""
    with _library() as (library, _):
        changes = _refresh(library, quiet=as_json)
        found = library.find(" ".join(words))
        table(found, as_json)
        _go_on(library, changes, quiet=as_json)
    if not found:
        sys.exit(1)


@app.command()
def verify(
    names: Annotated[list[str] | None, Argument(help="Models; all, if none is named.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Read files whole and compare with the hashes noted for them. Exit code 1 if any differs or cannot be opened."""
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
                print(json.dumps(asdict(found), ensure_ascii=False), flush=True)
            else:
                print(f"{'good' if found.good else 'BAD':4}  {found.path}: {found.reason}", flush=True)
        if not as_json:
            print(f"{len(entries)} models, {bad} bad")
    if bad:
        sys.exit(1)


@app.command()
def install(
    source: Annotated[
        str,
        Argument(help="A file, a URL, or a Hugging Face repository: ORG/NAME[@REVISION][/FILE].", show_default=False),
    ],
    kind: Annotated[str, Option(help="What it is, where its content does not tell.")] = "",
    name: Annotated[str, Option(help="What to call the file.")] = "",
    sha256: Annotated[str, Option(help="The hash that it has to have.")] = "",
    token: Annotated[str, Option(envvar="GOUACHE_TOKEN", help="A login token of the site.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Fetch a model, check and scan it, and place it in the right folder. Stopped, the same command goes on."""
    from gouache.app.install import install as service
    from gouache.cli.progress import bytes_bar

    with _library() as (library, settings):
        with bytes_bar() as bar:
            done = service(source, settings, kind=kind, name=name, sha256=sha256, token=token, on_work=bar.show)
        library.refresh()
        entry = library.describe(done.path, source=done.source)
    if as_json:
        print(json.dumps({**asdict(done), "path": str(done.path)}))
    else:
        print(
            f"{done.path}: {'was there already' if done.already else 'installed'}; {done.kind}, {size_text(done.size)}"
        )
        print(f"sha256 {done.sha256}; call it {entry.name!r}")


@contextmanager
def _library() -> Iterator[tuple[Library, Settings]]:
    from gouache.app.library import Library
    from gouache.app.settings import read

    settings = read()
    with Library.of(settings) as library:
        yield library, settings


def _refresh(library: Library, quiet: bool) -> Changes:
    from gouache.cli.progress import Bar

    with Bar() as bar:
        changes = library.refresh(bar.show)
    if not quiet:
        for before, now in changes.moved:
            print(f"note: {before} is {now} now, by its hash", file=sys.stderr)
    return changes


def _go_on(library: Library, changes: Changes, quiet: bool) -> None:
    """Have the files hashed that are not, after this command."""
    from gouache.app import indexing

    files, size = library.waiting
    if files:
        indexing.start()
        if not quiet:
            print(f"note: hashing {files} files ({size_text(size)}) in the background", file=sys.stderr)


def _entry(library: Library, name: str, settings: Settings) -> Entry:
    """The library's model of that name or path; of a path that is in none of its folders, what its header tells."""
    from gouache.app.names import resolve

    path = resolve(name, settings)
    return library.entry(path) or library.entry(path.absolute()) or library.look(path.absolute())


def _delete(entry: Entry) -> list[str]:
    import shutil

    try:
        shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
        gone = [str(entry.path)]
        for file in entry.sidecar.files:
            beside = entry.path.with_name(file)
            beside.unlink(missing_ok=True)
            gone.append(str(beside))
    except OSError as error:
        raise GouacheError(f"{entry.path}: cannot be deleted: {error.strerror}") from None
    return gone


def _say(as_json: bool, line: str, **told: object) -> None:
    print(json.dumps(told) if as_json else line)
