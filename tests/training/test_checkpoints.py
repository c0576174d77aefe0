"""Checkpoints on disk are complete or ignored, with files truncated, corrupted or missing and with a full disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gouache.errors import GouacheError, TrainingError
from gouache.files import write
from gouache.training import state
from gouache.training.state import State


def example(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "net.weight": torch.randn(8, 8, generator=generator),
        "net.bias": torch.randn(8, generator=generator).half(),
    }
    return State(
        {"weights": weights, "ema": {"net.weight": torch.full((8, 8), float(step))}}, {"step": step, "seed": 7}
    )


def same(a: State | None, b: State) -> bool:
    return (
        a is not None
        and a.values == b.values
        and a.tensors.keys() == b.tensors.keys()
        and all(a.tensors[file].keys() == b.tensors[file].keys() for file in b.tensors)
        and all(torch.equal(a.tensors[file][name], t) for file in b.tensors for name, t in b.tensors[file].items())
    )


def saved(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [state.save(folder, example(step), keep) for step in steps]


def test_a_saved_checkpoint_is_read_back_and_its_files_are_safetensors_and_json(tmp_path):
    from safetensors.torch import load_file

    (path,) = saved(tmp_path, 5)

    assert same(state.newest(tmp_path), example(5))
    assert torch.equal(load_file(path / "weights.safetensors")["net.bias"], example(5).tensors["weights"]["net.bias"])
    assert json.loads((path / "state.json").read_text()) == {"step": 5, "seed": 7}


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path):
    assert state.newest(tmp_path) is None


def test_checkpoints_are_ordered_by_step_number_not_by_spelling_or_date(tmp_path):
    older, newer = saved(tmp_path, 99_999_999, 100_000_000)
    os.utime(older, (2e9, 2e9))

    assert same(state.newest(tmp_path), example(100_000_000))
    assert state.checkpoints(tmp_path) == [older, newer]


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)

    assert [path.name for path in state.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_the_previous_step(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-00000002") / path.name, path)


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, zero, empty, replace_by_the_previous_step, Path.unlink])
def test_if_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(tmp_path, damage, name):
    saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-00000003" / name)

    notes: list[str] = []
    found = state.newest(tmp_path, on_note=notes.append)

    assert same(found, example(2))
    (note,) = notes
    assert "step-00000003 is damaged (" in note and note.endswith("goes on from step 2") and "\n" not in note
    assert (name if damage is not Path.unlink else "does not exist") in note or "manifest.json" in note


def test_a_checkpoint_copied_to_the_name_of_another_step_is_ignored(tmp_path):
    older, newer = saved(tmp_path, 1, 2)
    shutil.rmtree(newer)
    shutil.copytree(older, newer)

    assert same(state.newest(tmp_path), example(1))


def test_damaged_checkpoints_are_renamed_without_replacing_earlier_ones(tmp_path):
    saved(tmp_path, 1, 2)
    state.set_aside(tmp_path, after=1)
    saved(tmp_path, 2)
    state.set_aside(tmp_path, after=1)

    assert [path.name for path in state.checkpoints(tmp_path)] == ["step-00000001"]
    assert sorted(path.name for path in tmp_path.glob("*.bad*")) == ["step-00000002.bad", "step-00000002.bad1"]


def test_if_all_checkpoints_are_damaged_every_start_is_refused_and_nothing_is_moved(tmp_path):
    for path in saved(tmp_path, 1, 2):
        truncate(path / "weights.safetensors")

    for _ in range(2):
        with pytest.raises(TrainingError, match=r"all checkpoints are damaged .*step-00000001.*backup"):
            state.newest(tmp_path)

    assert len(state.checkpoints(tmp_path)) == 2


def test_a_checkpoint_of_a_newer_format_is_not_reported_as_damaged(tmp_path):
    _, path = saved(tmp_path, 1, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": state.FORMAT + 1}))

    with pytest.raises(TrainingError, match="newer Gouache"):
        state.newest(tmp_path)


def seal(path: Path) -> None:
    """Make manifest.json agree with state.json, as somebody does who edits a checkpoint by hand."""
    import hashlib

    manifest, content = json.loads((path / "manifest.json").read_text()), (path / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_files(path: Path) -> None:
    edit(path / "manifest.json", files={})


def without_a_seal_for_the_state(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit(path / "manifest.json", files={name: entry for name, entry in files.items() if name != "state.json"})
    edit(path / "state.json", seed=8)


def of_another_step(path: Path) -> None:
    edit(path / "manifest.json", step=99)


def with_a_path(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit(path / "manifest.json", files={**files, "../step-00000001/state.json": files["state.json"]})


def with_a_step_that_is_text(path: Path) -> None:
    edit(path / "state.json", step="2")
    seal(path)


def with_deep_json(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def with_a_huge_number(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": ' + "9" * 5000 + "}")


def with_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[1]")


def with_a_pipe(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def with_an_endless_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("/dev/zero")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
@pytest.mark.parametrize("change", [
    without_files, without_a_seal_for_the_state, of_another_step, with_a_path, with_a_step_that_is_text, with_deep_json,
    with_a_huge_number, with_a_list, with_a_pipe, with_an_endless_manifest,
])  # fmt: skip
def test_a_checkpoint_edited_by_hand_counts_as_damaged(tmp_path, change):
    saved(tmp_path, 1, 2)
    change(tmp_path / "step-00000002")

    notes: list[str] = []
    assert same(state.newest(tmp_path, on_note=notes.append), example(1))

    assert len(notes) == 1 and "step-00000002 is damaged (" in notes[0] and len(notes[0]) < 600


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_a_clean_error(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(TrainingError, match=r"step-00000002: is damaged and cannot be renamed \(Permission denied\)"):
        state.set_aside(tmp_path, after=1)


class Killed(BaseException):
    """In place of SIGKILL: nothing that the process does afterwards reaches the disk."""


def die_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Allow this number of calls that change the disk, then raise."""
    left = calls

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.skipif(sys.platform == "win32", reason="folders are synced on POSIX only")
def test_a_kill_between_any_two_disk_operations_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    before = tmp_path / "before"
    saved(before, 1, 2)
    seen = []

    for calls in range(1000):
        folder = tmp_path / f"died-after-{calls}"
        shutil.copytree(before, folder)
        with monkeypatch.context() as patch:
            die_after(patch, calls)
            try:
                state.save(folder, example(3), keep=1)
                died = False
            except Killed:
                died = True
        found = state.newest(folder)
        assert same(found, example(2)) or same(found, example(3))
        assert found is not None
        seen.append(found.step)
        if not died:
            break
        # The next start removes unfinished files and saves the next step.
        with state.locked(folder):
            assert same(state.newest(folder), found)
            assert not [path for path in folder.iterdir() if path.suffix in (".part", ".tmp")]
            state.save(folder, example(found.step + 1), keep=1)
            assert [path.name for path in state.checkpoints(folder)] == [f"step-{found.step + 1:08d}"]

    assert seen == sorted(seen) and seen.count(2) > 10 and seen.count(3) > 3


def test_a_disk_that_returns_wrong_bytes_does_not_cost_an_older_checkpoint(tmp_path, monkeypatch):
    import hashlib

    saved(tmp_path, 1)

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda file, name: hashlib.new(name, b"something else"))
        with pytest.raises(GouacheError):
            state.save(tmp_path, example(2), keep=1)

    assert same(state.newest(tmp_path), example(1))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_does_not_cost_an_older_checkpoint(tmp_path):
    import resource

    saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(GouacheError, match="cannot be written"):
            state.save(tmp_path, example(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert same(state.newest(tmp_path), example(1))


def test_the_error_for_a_folder_that_cannot_be_created_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(TrainingError, match="file/run: cannot be written to"), state.locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_run_in_a_locked_folder_is_refused(tmp_path):
    with (
        state.locked(tmp_path),
        pytest.raises(TrainingError, match="another run is training here"),
        state.locked(tmp_path),
    ):
        pass
    with state.locked(tmp_path):
        pass


def test_a_folder_that_is_only_looked_at_can_be_locked(tmp_path):
    """`is_locked` takes the lock for an instant; a run that starts then is not refused."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        release = threading.Timer(0.06, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        release.start()
        with state.locked(tmp_path):
            assert state.is_locked(tmp_path)
        release.join()


@pytest.mark.skipif(os.name != "posix", reason="processes cannot be examined elsewhere")
def test_a_lock_removes_the_temporary_files_of_killed_processes_alone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    own = write.temporary_name(tmp_path, ".tmp")
    stale = own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{ended.pid}."))
    for path in (own, stale):
        path.touch()
    with state.locked(tmp_path):
        assert own.exists() and not stale.exists()
