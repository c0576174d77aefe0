"""A file is written completely or not at all, whatever fails during the write."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gouache.errors import DamagedFile, FileError, ModelError
from gouache.files import write
from gouache.files.open import open_model
from gouache.files.record import TensorInfo
from gouache.files.write import atomic_output, describe, stream_safetensors, write_atomic, write_safetensors


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_file_is_written_and_replaced(tmp_path: Path):
    path = tmp_path / "a.bin"

    write_atomic(path, b"old")
    write_atomic(path, b"new")

    assert path.read_bytes() == b"new"
    assert only(tmp_path, "a.bin")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    with pytest.raises(error), atomic_output(path) as output:
        output.write(b"half of the n")
        raise error

    assert path.read_bytes() == b"old"
    assert only(tmp_path, "a.bin")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_error_leaves_the_old_file_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(write.os, call, fails)

    with pytest.raises(FileError, match=r"a\.bin: cannot be written: Input/output error; .* unchanged"):
        write_atomic(path, b"new")

    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert only(tmp_path, "a.bin")


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path):
    with pytest.raises(FileError, match=r"needs 9000000000 MB, and 16 MB that stay free, but only \d+ MB are free"), \
            atomic_output(tmp_path / "a.bin", 9 * 10**15):  # fmt: skip
        raise AssertionError("the block must not be entered")

    assert only(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file size")
def test_a_disk_that_fills_up_during_the_write_leaves_the_old_file(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"old")
    code = (
        "import resource, signal, sys\nfrom gouache.files.write import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write_atomic(sys.argv[1], bytes(1_000_000))"
    )

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.bin")], capture_output=True, text=True)

    assert "FileError" in done.stderr and "cannot be written" in done.stderr
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert only(tmp_path, "a.bin")


def test_a_process_killed_at_any_moment_leaves_one_complete_file(tmp_path: Path):
    path = tmp_path / "a.bin"
    code = (
        "import sys\nfrom gouache.files.write import write_atomic\nprint('ready', flush=True)\n"
        "n = 0\nwhile True:\n    write_atomic(sys.argv[1], bytes([n % 256]) * 300_000)\n    n += 1"
    )
    for moment in (0.0, 0.003, 0.01, 0.023, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        process.kill()
        process.wait()
        process.stdout.close()

        if path.exists():
            content = path.read_bytes()
            assert len(content) == 300_000 and len(set(content)) == 1


def test_a_file_that_reads_back_differently_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    real = os.fsync

    def damages(descriptor: int) -> None:
        real(descriptor)
        os.pwrite(descriptor, b"X", 0)

    monkeypatch.setattr(write.os, "fsync", damages)

    with pytest.raises(DamagedFile, match="differs from what was written when read back"):
        write_atomic(path, b"new")

    assert path.read_bytes() == b"old"


def test_the_folder_is_synchronised_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        order.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(write.os, "fsync", sync)
    monkeypatch.setattr(write.os, "replace", replace)

    write_atomic(tmp_path / "a.bin", b"old")
    made, order[:] = order[:], []
    write_atomic(tmp_path / "a.bin", b"new")

    assert [what for what in made if what != "replace"] == ["file", "folder"]  # a new file may not need os.replace
    assert order == ["file", "replace", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="needs to know whether a process is running")
@pytest.mark.parametrize("unnamed", [True, False], ids=["unnamed temporaries", "named temporaries"])
def test_temporary_files_of_killed_processes_are_removed_and_those_of_running_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
):
    if not unnamed:
        monkeypatch.delattr(write.os, "O_TMPFILE", raising=False)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours = write.temporary_name(tmp_path, ".tmp")
    theirs = ours.with_name(ours.name.replace(f"-{os.getpid()}.", f"-{ended.pid}."))
    foreign = tmp_path / ".gouache-another.tmp"
    for path in (ours, theirs, foreign, tmp_path / "a.bin"):
        path.write_bytes(b"half of")

    write_atomic(tmp_path / "a.bin", b"new")

    assert only(tmp_path, ours.name, foreign.name, "a.bin")


def test_permissions_of_a_replaced_file_are_kept_and_new_files_get_the_default(tmp_path: Path):
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / "kept").chmod(0o640)
    (tmp_path / "usual").write_bytes(b"made by open()")

    write_atomic(tmp_path / "kept", b"new")
    write_atomic(tmp_path / "new", b"new")

    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o640
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_is_replaced_and_its_target_is_unchanged(tmp_path: Path):
    (tmp_path / "blob").write_bytes(b"in the cache")
    (tmp_path / "link").symlink_to("blob")

    write_atomic(tmp_path / "link", b"new")

    assert (tmp_path / "blob").read_bytes() == b"in the cache"
    assert (tmp_path / "link").read_bytes() == b"new"


@pytest.mark.parametrize("target", ["missing/a.bin", "folder", "/dev/null"])
def test_invalid_targets_are_one_line_errors(tmp_path: Path, target: str):
    (tmp_path / "folder").mkdir()

    with pytest.raises(FileError, match="cannot be written: it"):
        write_atomic(tmp_path / target, b"new")

    assert only(tmp_path, "folder")


def test_a_mapped_file_can_be_replaced(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"a": torch.arange(1000.0), "b": torch.ones(3)}, path)
    file = open_model(path)
    mapped = file.tensor("a")

    stream_safetensors(path, {"a": TensorInfo((1000,), "F32")}, file.read)

    assert mapped.equal(torch.arange(1000.0))
    assert list(open_model(path)) == ["a"]


def test_a_model_is_converted_tensor_by_tensor(tmp_path: Path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"view": torch.arange(6.0).view(2, 3).t()}
    torch.save(tensors, tmp_path / "m.ckpt")
    file = open_model(tmp_path / "m.ckpt")
    names_read: list[str] = []

    def read(name: str) -> torch.Tensor:
        names_read.append(name)
        return file.read(name)

    digest = stream_safetensors(tmp_path / "m.safetensors", file.tensors, read, {"format": "pt"})

    loaded = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == tensors.keys() and all(loaded[name].equal(tensors[name]) for name in tensors)
    assert sorted(names_read) == sorted(tensors)
    assert digest == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float16)])
def test_a_tensor_with_another_shape_or_dtype_than_announced_stops_the_write(tmp_path: Path, wrong: torch.Tensor):
    with pytest.raises(ModelError, match=r"tensor 'w' is .*, expected F32 \[2\]"):
        stream_safetensors(tmp_path / "m.safetensors", {"w": TensorInfo((2,), "F32")}, lambda name: wrong)

    assert only(tmp_path)


def test_content_that_safetensors_cannot_store_is_refused(tmp_path: Path):
    path = tmp_path / "m.safetensors"

    with pytest.raises(ModelError, match="complex128"):
        describe(torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(ModelError, match="not text"):
        write_safetensors(path, {}, {"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match="__metadata__"):
        write_safetensors(path, {"__metadata__": torch.zeros(1)})
    with pytest.raises(FileError, match="Unicode"):
        write_safetensors(path, {"\ud800": torch.zeros(1)})

    assert only(tmp_path)


def test_parameters_and_views_are_written_as_their_values(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"p": torch.nn.Parameter(base.clone()), "t": base.t(), "s": base[:, ::2], "e": torch.ones(1).expand(3)}

    write_safetensors(tmp_path / "m.safetensors", tensors)

    loaded = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())
