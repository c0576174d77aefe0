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

from gouache.app import indexing, tables
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
