"""The library: its models and the user's notes, both kept when files are moved or renamed and the program restarted."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError

from gouache.app import indexing, tables
from gouache.app import library as library_module
from gouache.app.entry import About
from gouache.app.library import Library
from gouache.app.settings import Settings
from gouache.app.verify import verify
from gouache.errors import FileError, RequestError
from tests.app.model_files import embedding, lora


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Settings:
    return replace(settings, models=(tmp_path / "models",), cache=tmp_path / "cache", data=tmp_path / "data")


def hash_all(library: Library) -> None:
    while library.hash_next() is not None:
        pass


def test_refresh_identifies_each_file(own: Settings, tmp_path: Path):
    lora(tmp_path / "models/Lora/style.safetensors", ss_tag_frequency=json.dumps({"a": {"hat": 9, "cat": 2}}))
    embedding(tmp_path / "models/embeddings/bad.safetensors")
    (tmp_path / "models/page.ckpt").write_text("<!DOCTYPE html>")

    with Library.of(own) as library:
        changes = library.refresh()
        by_name = {each.name: each for each in library.entries()}

    assert len(changes.new) == 3
    assert (by_name["style"].kind, by_name["style"].family, by_name["style"].category) == ("lora", "sd1", "lora")
    assert by_name["style"].details.trigger_words == ("hat", "cat") and by_name["style"].details.title == "style"
    assert (by_name["bad"].kind, by_name["bad"].family) == ("embedding", "sd1")
    assert "web page" in by_name["page"].error and by_name["page"].category == "unknown"


def test_a_second_refresh_reports_only_changes(own: Settings, tmp_path: Path):
    paths = [lora(tmp_path / f"models/{name}.safetensors", number) for number, name in enumerate("abc")]
    with Library.of(own) as library:
        library.refresh()
        assert library.refresh() == type(library.refresh())()

        lora(paths[0], 7.0)
        os.utime(paths[0], ns=(0, 1))
        paths[1].unlink()
        changes = library.refresh()

        assert (changes.new, changes.changed, changes.gone) == ([], [paths[0]], [paths[1]])
        assert [each.name for each in library.entries()] == ["a", "c"]
        assert [each.name for each in library.entries(missing=True)] == ["b"]


def test_notes_follow_a_file_that_is_moved_and_renamed(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    lora(tmp_path / "models/other.safetensors", 2.0)
    with Library.of(own) as library:
        library.refresh()
        added = library.describe(path, tags=("hat",), weight=0.7, use="anime").added

    moved = tmp_path / "models/sub/b.safetensors"
    moved.parent.mkdir()
    path.rename(moved)
    with Library.of(own) as library:
        changes = library.refresh()
        entry = library.entry(moved)
        found = [each.path for each in library.entries()]

    assert changes.moved == [(path, moved)]
    assert entry is not None and entry.about == About(tags=("hat",), weight=0.7, use="anime") and entry.added == added
    assert len(found) == 2 and path not in found


def test_a_copy_has_the_same_notes(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library:
        library.refresh()
        library.describe(path, notes="of both")
        copy = path.with_name("copy.safetensors")
        copy.write_bytes(path.read_bytes())
        library.refresh()
        hash_all(library)

        entry = library.entry(copy)

    assert entry is not None and entry.about.notes == "of both"


def test_files_are_hashed(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library:
        library.refresh()
        assert library.unhashed == (1, path.stat().st_size)
        hash_all(library)
        entry = library.entry(path)

        assert library.unhashed == (0, 0)
        assert entry is not None and entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert library.paths_of_hash(entry.sha256[:10]) == [path] and library.paths_of_hash("") == []


def test_the_hash_of_a_file_in_the_hub_cache_is_its_name(own: Settings, tmp_path: Path):
    real = lora(tmp_path / "hub/models--org--one/blobs/tmp.safetensors", 1.0)
    digest = hashlib.sha256(real.read_bytes()).hexdigest()
    blob = real.rename(real.with_name(digest))
    link = tmp_path / "hub/models--org--one/snapshots/aa/style.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)

    with Library.of(replace(own, hub=tmp_path / "hub")) as library:
        library.refresh()
        (entry,) = library.entries()

    assert (entry.name, entry.sha256, entry.kind) == ("org/one/style", digest, "lora")


def test_models_are_found_by_words(own: Settings, tmp_path: Path):
    one = lora(tmp_path / "models/one.safetensors", 1.0)
    two = lora(tmp_path / "models/two.safetensors", 2.0)
    two.with_suffix(".json").write_text(json.dumps({"description": "Paints big HATS", "activation text": "blue hat"}))
    with Library.of(own) as library:
        library.refresh()
        library.describe(one, tags=("Hats",), notes="for winter")

        def found(words: str) -> list[str]:
            return [each.name for each in library.find(words)]

        assert found("hats") == ["one", "two"]
        assert found("hats winter") == ["one"]
        assert found("blue HAT") == ["two"]
        assert found("sd1 lora") == ["one", "two"]
        assert found("scarf") == []
        assert [each.name for each in library.entries(tag="hats")] == ["one"]
        assert [each.name for each in library.entries(kind="lora", family="sd1")] == ["one", "two"]
        assert library.entries(family="sdxl") == []


def test_values_of_the_user_take_precedence_over_sidecar_files(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    path.with_suffix(".json").write_text(json.dumps({"notes": "sidecar", "preferred weight": 0.5}))
    with Library.of(own) as library:
        library.refresh()
        entry = library.describe(path, weight=1.5)

    assert (entry.details.weight, entry.details.notes) == (1.5, "sidecar")
    assert json.loads(path.with_suffix(".json").read_text()) == {"notes": "sidecar", "preferred weight": 0.5}


@pytest.mark.parametrize("values", [{"use": "cubist"}, {"weight": 99.0}])
def test_invalid_values_are_refused(own: Settings, tmp_path: Path, values: dict[str, object]):
    path = lora(tmp_path / "models/a.safetensors")
    with Library.of(own) as library:
        library.refresh()
        with pytest.raises(RequestError):
            library.describe(path, **values)


def test_a_file_name_that_is_not_unicode(own: Settings, tmp_path: Path):
    folder = os.fsencode(tmp_path / "models")
    path = Path(os.fsdecode(folder + b"/\xff\xfe.safetensors"))
    path.parent.mkdir()
    try:
        lora(tmp_path / "a.safetensors").rename(path)
    except OSError:
        pytest.skip("this file system requires names in Unicode")

    with Library.of(own) as library:
        library.refresh()
        (entry,) = library.entries()

    assert os.fsencode(entry.path).endswith(b"/\xff\xfe.safetensors") and entry.kind == "lora"


def test_verify_detects_changed_bytes_with_the_same_size_and_time(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library:
        library.refresh()
        hash_all(library)

        def verdict() -> tuple[bool, str]:
            entry = library.entry(path)
            assert entry is not None
            found = verify(entry, library)
            return found.good, found.reason

        assert verdict() == (True, "same hash as recorded")
        before = path.stat()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as on a failing disk
        library.refresh()
        good, reason = verdict()

    assert not good and "damaged" in reason


def test_verify_compares_with_the_hash_in_a_sidecar_file(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    path.with_suffix(".metadata.json").write_text(json.dumps({"sha256": "0" * 64}))
    with Library.of(own) as library:
        library.refresh()
        (entry,) = library.entries()
        found = verify(entry, library)

    assert not found.good and "its metadata gives 000" in found.reason


def test_only_one_process_indexes_at_a_time(own: Settings, tmp_path: Path):
    lora(tmp_path / "models/a.safetensors", 1.0)
    lora(tmp_path / "models/b.safetensors", 2.0)

    with indexing._lock(own.cache / "indexing.lock") as locked:
        assert locked and indexing.index(own) == 0
    assert indexing.index(own, should_stop=lambda: True) == 0
    assert indexing.index(own) == 2 and indexing.index(own) == 0


def test_the_background_process_hashes_files(tmp_path: Path):
    lora(tmp_path / "models/a.safetensors", 1.0)
    folders = {"GOUACHE_DATA": tmp_path / "data", "GOUACHE_MODELS": tmp_path / "models", "XDG_CACHE_HOME": tmp_path}
    environment = {**os.environ, **{name: str(path) for name, path in folders.items()}}

    subprocess.run([sys.executable, "-m", "gouache.app.indexing"], env=environment, check=True, timeout=120)

    with sqlite3.connect(tmp_path / "data/library.sqlite") as database:
        (digest,) = database.execute("SELECT sha256 FROM file").fetchone()
    assert digest == hashlib.sha256((tmp_path / "models/a.safetensors").read_bytes()).hexdigest()


def test_the_migrations_create_the_tables_of_the_code(tmp_path: Path):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = tables.Database(tmp_path / "library.sqlite").engine
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), tables.Base.metadata)

    assert differences == []
    newest = max(path.stem for path in (Path(tables.__file__).parent / "migrations/versions").glob("v*.py"))
    assert newest == f"v{tables.HEAD}"


def test_a_database_of_a_newer_gouache_is_refused(tmp_path: Path):
    tables.Database(tmp_path / "library.sqlite").close()
    with sqlite3.connect(tmp_path / "library.sqlite") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(FileError, match="newer Gouache"):
        tables.Database(tmp_path / "library.sqlite")


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path):
    (tmp_path / "library.sqlite").write_bytes(b"no database at all" * 100)

    with pytest.raises(FileError, match=r"library\.sqlite.*move it away"):
        tables.Database(tmp_path / "library.sqlite")


def processes(own: Settings, code: str, count: int) -> list[tuple[int, str]]:
    """Run `code` in `count` processes at once, with `own` and `number`; (exit code, error output) of each."""
    start = (
        "import sys; from pathlib import Path; from gouache.app.settings import Settings; number = int(sys.argv[1])\n"
        "from gouache.app.library import Library\n"
        f"own = Settings((Path({str(own.models[0])!r}),), Path('out'), None, None, Path({str(own.cache)!r}), "
        f"Path({str(own.data)!r}))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
    )
    every = [
        subprocess.Popen(
            [sys.executable, "-c", start + code, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    for each in every:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    ended = []
    for each in every:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in every:
        _, errors = each.communicate(timeout=120)
        ended.append((each.returncode, errors))
    return ended


def test_three_processes_find_the_same_new_files_at_once(own: Settings, tmp_path: Path):
    """With a new database, and with one that exists."""
    for round_ in range(2):
        for number in range(40):
            lora(tmp_path / f"models/{round_}-{number:03d}.safetensors", number)

        ended = processes(own, "with Library.of(own) as library: library.refresh()", 3)

        assert ended == [(0, "")] * 3
        with Library.of(own) as library:
            assert len(library.entries()) == 40 * (round_ + 1)


def test_tags_that_several_processes_add_at_once_are_all_kept(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library:
        library.refresh()

    code = f"with Library.of(own) as library: library.describe(Path({str(path)!r}), add_tags=[f't{{number}}'])"
    ended = processes(own, code, 4)

    assert ended == [(0, "")] * 4
    with Library.of(own) as library:
        entry = library.describe(path, remove_tags=["t0"])
        assert sorted(entry.about.tags) == ["t1", "t2", "t3"] and library.entry(path) == entry


def test_a_refresh_does_not_remove_a_hash_that_another_process_stored(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library, Library.of(own) as other:
        library.refresh()
        rows = library._rows()
        hash_all(other)
        path.with_suffix(".json").write_text('{"notes": "new"}')
        library._store([replace(row, kind="lora") for row in rows.values()])
        entry = other.entry(path)

    assert entry is not None and entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_stopped_refresh_keeps_what_it_read(own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library_module, "_BATCH", 5)
    for number in range(20):
        lora(tmp_path / f"models/{number:03d}.safetensors")

    def stop(what: str, done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with Library.of(own) as library:
        with pytest.raises(KeyboardInterrupt):
            library.refresh(stop)
        kept = len(library.entries())
        new = len(library.refresh().new)

    assert (kept, new) == (10, 10)


@pytest.mark.parametrize(
    "change",
    [
        "facts='{'", "facts='[1]'", f"facts='{'[' * 100_000}'", f"facts='{{\"a\": {'9' * 5000}}}'", "added='x'",
        "names='{'", "names='[]'", "names='[1]'", "names='null'", "sidecar='5'", "size='x'", "mtime_ns='x'",
        "kind=x'ff'",
        "facts=x'ff'", "sha256=x'ff'", "sha256='\x1b[31m'",
        'sidecar=\'{"title": 5, "tags": [1, "a"], "weight": "x", "files": {}, "other": 1}\'',
    ],
)  # fmt: skip
def test_a_damaged_row_is_read_again(own: Settings, tmp_path: Path, change: str):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    lora(tmp_path / "models/b.safetensors", 2.0)
    with Library.of(own) as library:
        library.refresh()
        before = library.entry(path)
    with sqlite3.connect(own.data / "library.sqlite") as database:
        database.execute(f"UPDATE file SET {change} WHERE path = ?", (os.fsencode(path),))

    with Library.of(own) as library:
        assert len(library.entries()) == 2 and library.find("nothing") == []
        library.refresh()
        after = library.entry(path)

    assert before is not None and after is not None
    assert replace(after, added=before.added) == before


@pytest.mark.parametrize("change", ["tags='{'", "tags='5'", "tags='[1]'", "weight='x'", "weight=1e9", "use='cubist'"])
def test_damaged_notes_are_left_out(own: Settings, tmp_path: Path, change: str):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library:
        library.refresh()
        library.describe(path, notes="mine")
    with sqlite3.connect(own.data / "library.sqlite") as database:
        database.execute(f"UPDATE about SET {change}")

    with Library.of(own) as library:
        (entry,) = library.entries()

    assert entry.about == About(notes="mine")


def refuse(own: Settings) -> str:
    """The error of a refresh."""
    with pytest.raises(FileError) as caught, Library.of(own) as library:
        library.refresh()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "damage", ["drop table file", "drop table about", "alter table file drop column kind", "alter table about drop vae"]
)
def test_a_database_without_a_table_or_column_is_damaged(own: Settings, tmp_path: Path, damage: str):
    lora(tmp_path / "models/a.safetensors")
    Library.of(own).close()
    with sqlite3.connect(own.data / "library.sqlite") as database:
        database.execute(damage)

    with pytest.raises(FileError, match=r"is damaged .*move it away and keep it"), Library.of(own) as library:
        library.refresh()
        library.entries()


@pytest.mark.parametrize("where", [0, 4096, 8192, 20000])
def test_a_database_with_damaged_pages_is_one_line(own: Settings, tmp_path: Path, where: int):
    for number in range(30):
        lora(tmp_path / f"models/{number}.safetensors")
    with Library.of(own) as library:
        library.refresh()
    path = own.data / "library.sqlite"
    data = bytearray(path.read_bytes())
    data[where : where + 8192] = os.urandom(8192)
    for each in path.parent.glob("library.sqlite-*"):
        each.unlink()
    path.write_bytes(data)

    try:
        with Library.of(own) as library:
            library.refresh()
            library.entries()
    except FileError as error:
        assert "\n" not in str(error) and "is damaged" in str(error)


@pytest.mark.parametrize("version", ["../../../x", "\x1b[31mX", "x" * 5000, "9999", "", "0001x"])
def test_an_unknown_version_is_one_line(own: Settings, version: str):
    Library.of(own).close()
    with sqlite3.connect(own.data / "library.sqlite") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))

    error = refuse(own)

    assert "newer Gouache" in error and "\x1b" not in error and len(error) < 400


def test_a_database_of_an_older_gouache_is_upgraded(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    with Library.of(own) as library:
        library.refresh()
        library.describe(path, notes="mine")
    with sqlite3.connect(own.data / "library.sqlite") as database:
        database.execute("DROP INDEX ix_file_autov3")
        database.execute("ALTER TABLE file DROP COLUMN autov3")
        database.execute("UPDATE alembic_version SET version_num = '0002'")

    with Library.of(own) as library:
        library.refresh()
        (entry,) = library.entries()

    assert entry.about.notes == "mine"


def test_a_full_disk_does_not_advise_to_move_a_sound_database_away(own: Settings, tmp_path: Path):
    lora(tmp_path / "models/a.safetensors", 1.0)
    for code, reason in (
        (sqlite3.SQLITE_FULL, "the disk is full"),
        (sqlite3.SQLITE_READONLY, "is read-only"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "is read-only"),
        (sqlite3.SQLITE_BUSY, "another process has been writing"),
        (sqlite3.SQLITE_IOERR, "check the permissions"),
        (sqlite3.SQLITE_CANTOPEN, "check the permissions"),
    ):
        cause = sqlite3.OperationalError("some message")
        cause.sqlite_errorcode = code
        found = tables._reason(tmp_path / "library.sqlite", DatabaseError("", {}, cause))

        assert reason in found and "move" not in found and "\n" not in found


@pytest.mark.skipif(os.name != "posix" or not Path("/dev/shm").is_dir(), reason="there is no small file system")
def test_a_real_full_or_read_only_database_is_one_line(own: Settings, tmp_path: Path):
    lora(tmp_path / "models/a.safetensors", 1.0)
    Library.of(own).close()
    with sqlite3.connect(own.data / "library.sqlite") as database:
        pages = database.execute("PRAGMA page_count").fetchone()[0]
    limited = Library.of(own)
    event.listen(
        limited._database.engine,
        "connect",
        lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}"),
    )
    limited._database.engine.dispose()
    for number in range(100):
        lora(tmp_path / f"models/{'x' * 100}{number}.safetensors")

    with pytest.raises(FileError, match=r"the disk is full.*sound"), limited:
        limited.refresh()


def test_a_database_that_another_process_is_writing_is_waited_for(
    own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lora(tmp_path / "models/a.safetensors", 1.0)
    Library.of(own).close()
    monkeypatch.setattr(tables, "WAIT", 0.2)
    writer = sqlite3.connect(own.data / "library.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")

    assert "another process has been writing" in refuse(own)
    with Library.of(own) as library:
        assert library.entries() == []
    writer.execute("COMMIT")
    writer.close()
    with Library.of(own) as library:
        library.refresh()
        assert len(library.entries()) == 1


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a#b", "file:x?mode=memory", "ü é"])
def test_the_data_folder_is_taken_literally(own: Settings, tmp_path: Path, name: str):
    with Library.of(replace(own, data=tmp_path / name)) as library:
        library.refresh()

    assert (tmp_path / name / "library.sqlite").is_file()
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == [name]


@pytest.mark.skipif(os.name != "posix", reason="there are no such permissions")
def test_notes_are_private(own: Settings, tmp_path: Path):
    with Library.of(own) as library:
        library.refresh()

    assert own.data.stat().st_mode & 0o777 == 0o700
    assert (own.data / "library.sqlite").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_what_is_no_database_is_one_line(own: Settings, tmp_path: Path):
    own.data.mkdir()
    path = own.data / "library.sqlite"
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir):
        make()
        assert "not a regular file" in refuse(own)
        path.rmdir() if path.is_dir() else path.unlink()


def test_odd_files_do_not_hide_the_others(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    (tmp_path / "models/self.safetensors").symlink_to("self.safetensors")
    (tmp_path / "models/dangling.safetensors").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "models/pipe.safetensors")
        (tmp_path / "models/endless.safetensors").symlink_to("/dev/zero")
    with Library.of(own) as library:
        library.refresh()
        hash_all(library)
        errors = {each.name: each.error for each in library.entries()}

    assert errors.pop("a") == "" and all(errors.values()) and set(errors) >= {"self", "dangling"}
    assert path.is_file()


@pytest.mark.parametrize("seconds", [-(10**12), 10**12])
def test_a_file_of_an_impossible_time_is_listed(own: Settings, tmp_path: Path, seconds: int, monkeypatch):
    path = lora(tmp_path / "models/a.safetensors", 1.0)
    real = path.stat()
    monkeypatch.setattr(library_module, "_size_and_mtime", lambda path: (real.st_size, clamp(seconds * 10**9)))
    with Library.of(own) as library:
        library.refresh()
        assert len(library.entries()) == 1
        assert library.read_entry(path).added


def clamp(mtime: int) -> int:
    return max(-(2**63), min(mtime, 2**63 - 1))


def test_words_of_a_sidecar_file_that_stayed_behind_are_still_found(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "models/hats.safetensors", 1.0)
    path.with_suffix(".json").write_text(json.dumps({"activation text": "blue hat", "preferred weight": 0.7}))
    moved, again = tmp_path / "models/hats-v2.safetensors", tmp_path / "models/sub/hats-v3.safetensors"
    again.parent.mkdir()
    with Library.of(own) as library:
        library.refresh()
        hash_all(library)

        def words() -> list[str]:
            library.refresh()
            return [each.name for each in library.find("blue hat")]

        path.rename(moved)
        assert words() == ["hats-v2"] and words() == ["hats-v2"]
        (entry,) = library.entries()
        assert entry.details.weight == 0.7 and entry.sidecar.left_at == str(path)
        moved.rename(again)
        assert words() == ["hats-v3"]
        lora(path, 5.0)  # another model, to which the file belongs now
        assert words() == ["hats"]
        path.unlink()
        path.with_suffix(".json").unlink()
        assert words() == []


def test_names_that_are_not_text_can_be_described(own: Settings, tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path / "models") + b"/\xff.safetensors"))
    path.parent.mkdir()
    try:
        lora(tmp_path / "a.safetensors").rename(path)
    except OSError:
        pytest.skip("this file system requires names in Unicode")
    path.with_suffix(".json").write_text('{"notes": "\\udcff"}')
    path.with_suffix(".png").write_bytes(b"x")

    with Library.of(own) as library:
        library.refresh()
        entry = library.describe(path, source=str(path), notes="\udcff", add_tags=["\udcff"])
        assert library.refresh() == type(library.refresh())()

    assert entry.about.notes == "\\udcff" or entry.about.notes == "\udcff"
