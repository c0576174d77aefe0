"""Every command that writes, killed by SIGKILL at each kind of file operation: the old file is intact, or the new one.

`moments` runs a command once, and lists its file operations with the contents of the folder at each. Then the command
is killed at the first and the last operation of each kind, in the middle of writing, and before and after the one that
makes its result appear.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.pipelines import Narrow, altered

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL of POSIX")

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Work:
    """A command with inputs as `{a}`; `target` is its output; `over` the input that is at `target` before."""

    command: str
    target: str
    over: str = ""


WORKS = {
    "convert-safetensors": Work("convert {ckpt} out.safetensors", "out.safetensors"),
    "convert-ckpt-over-another": Work("convert {a} out.ckpt --dtype fp16 --overwrite", "out.ckpt", "word"),
    "convert-folder": Work("convert {a} out", "out"),
    "convert-onto-itself": Work(
        "convert m.safetensors m.safetensors --dtype fp16 --overwrite", "m.safetensors", "lora"
    ),
    "prune": Work("prune {trained} out.safetensors --dtype fp16", "out.safetensors"),
    "merge": Work("merge {a} {b} out.safetensors --alpha 0.3", "out.safetensors"),
    "vae-bake": Work("vae bake {a} {b} out.safetensors", "out.safetensors"),
    "vae-extract": Work("vae extract {a} out.safetensors", "out.safetensors"),
    "lora-extract": Work("lora extract {b} {a} out.safetensors --rank 2 --no-text", "out.safetensors"),
    "lora-bake": Work("lora bake {a} {lora}:0.5 out.safetensors", "out.safetensors"),
    "lora-resize": Work("lora resize {lora} out.safetensors --rank 2", "out.safetensors"),
    "lora-merge": Work("lora merge {lora} {lora}:0.5 out.safetensors", "out.safetensors"),
    "lora-rename": Work("lora rename {lora} out.safetensors --to peft", "out.safetensors"),
    "embedding-merge": Work("embedding merge {word} {word}:0.5 out.safetensors", "out.safetensors"),
    "metadata-in-place": Work("metadata m.safetensors --set author=somebody", "m.safetensors", "lora"),
}


@dataclass(frozen=True)
class Moment:
    """The `number`-th operation of its `kind`, the names in the folder at that time, and the inode of the target."""

    kind: str
    number: int
    names: list[str]
    inode: int | None


class Commands:
    """The process that runs commands in forks of itself."""

    def __init__(self, folder: Path) -> None:
        self.output, self._moments = folder / "output", folder / "moments"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "moments.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GOUACHE_DEVICE": "cpu", "GOUACHE_DTYPE": "fp32"},
        )  # fmt: skip

    def run(
        self, command: str, folder: Path, target: str = "", kill: Moment | None = None, number: int = signal.SIGKILL
    ) -> int:
        """The exit code; the negative number of the signal that ended it."""
        job = {
            "arguments": command.split(), "folder": str(folder), "target": target, "output": str(self.output),
            "moments": str(self._moments), "kill": [kill.kind, kill.number] if kill else None, "signal": number,
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def moments(self) -> list[Moment]:
        """Those of the last run that was not killed."""
        return [Moment(*each) for each in json.loads(self._moments.read_text())]

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


def add_noise(tensors: dict[str, Tensor]) -> None:
    random = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=random)


def add_ema(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1


@pytest.fixture(scope="module")
def inputs(
    narrow: Callable[[str], Narrow], commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    a = narrow("sd1").file
    found = {name: folder / f"{name}.safetensors" for name in ("b", "trained", "lora", "word")}
    found |= {"a": a, "ckpt": folder / "a.ckpt"}
    altered(a, found["b"], add_noise)
    altered(a, found["trained"], add_ema)
    save_file({"emb_params": torch.ones(2, 64)}, found["word"])
    for command in (
        f"convert {a} {found['ckpt']}",
        f"lora extract {found['b']} {a} {found['lora']} --rank 4",
        f"merge {a} {found['b']} m.safetensors",  # caches their hashes, so that later runs have the same operations
    ):
        assert commands.run(command, folder) == 0, commands.output.read_text()
    return found


# They write as others do.
ALIKE = (
    "vae-extract", "vae-bake", "lora-extract", "lora-resize", "lora-merge", "lora-rename", "embedding-merge", "merge",
    "prune",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in ALIKE else n for n in WORKS])
def test_a_killed_command_leaves_the_old_file_or_the_whole_result(
    name: str, commands: Commands, inputs: dict[str, Path], tmp_path: Path
):
    work = WORKS[name]
    command, target = work.command.format(**inputs), tmp_path / work.target

    prepare = functools.partial(put_in_place, target, inputs[work.over] if work.over else None)
    prepare()
    before = content(target)
    assert commands.run(command, tmp_path, work.target) == 0, commands.output.read_text()
    moments, whole = commands.moments(), content(target)
    appeared = [each.inode is not None and each.inode != moments[0].inode for each in moments]
    assert appeared == sorted(appeared) and any(appeared), "the result appears once, and stays"
    for each, done in zip(moments, appeared):
        present = {work.target} if done or work.over else set()
        assert set(each.names) - {work.target} <= drafts(each.names, tmp_path, bool(work.over)), each
        assert present == set(each.names) & {work.target}, each

    for kill in some(moments, appeared.index(True)):
        prepare()
        assert commands.run(command, tmp_path, work.target, kill) == -9, kill

        found, expected = content(target), whole if appeared[moments.index(kill)] else before
        assert found == expected, kill
        names = names_in(tmp_path)
        assert set(names) - {work.target} <= drafts(names, tmp_path, bool(work.over)), kill

    prepare()
    assert commands.run(command, tmp_path, work.target) == 0, commands.output.read_text()
    assert content(target) == whole
    assert names_in(tmp_path) == [work.target], "files of killed runs are removed"


@pytest.mark.parametrize("name", ["convert-safetensors", "convert-folder", "merge", "metadata-in-place"])
def test_a_terminated_command_leaves_nothing_unfinished(
    name: str, commands: Commands, inputs: dict[str, Path], tmp_path: Path
):
    """SIGTERM ends it as Ctrl-C does: temporary files and folders are removed."""
    work = WORKS[name]
    command, target = work.command.format(**inputs), tmp_path / work.target

    prepare = functools.partial(put_in_place, target, inputs[work.over] if work.over else None)
    prepare()
    before = content(target)
    assert commands.run(command, tmp_path, work.target) == 0, commands.output.read_text()
    whole, moments = content(target), commands.moments()

    kinds = set[str]()
    for moment in [each for each in moments if each.kind not in kinds and not kinds.add(each.kind)] + moments[-1:]:
        prepare()
        code = commands.run(command, tmp_path, work.target, moment, signal.SIGTERM)

        assert code == 143 and commands.output.read_text().endswith("stopped\n"), (moment, commands.output.read_text())
        assert set(names_in(tmp_path)) <= {work.target}, moment
        assert content(target) in (before, whole), moment


def put_in_place(target: Path, before: Path | None) -> None:
    """Make `target` a copy of `before`; remove it if that is None."""
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    if before is not None:
        shutil.copy(before, target)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(path: Path) -> Any:
    """The hash of a file, or of each file in a folder; None if there is none."""
    if path.is_dir():
        return {str(each.relative_to(path)): content(each) for each in path.rglob("*") if each.is_file()}
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def some(moments: list[Moment], appears: int) -> list[Moment]:
    """The first and last of each kind, one in the middle of writing, and those before and after the result appears."""
    chosen = {appears - 1, appears}
    for kind in {each.kind for each in moments}:
        numbers = [number for number, each in enumerate(moments) if each.kind == kind]
        chosen |= {numbers[0], numbers[-1]} | ({numbers[len(numbers) // 2]} if kind == "write" else set())
    return [moments[number] for number in sorted(chosen)]


def drafts(names: list[str], folder: Path, over: bool) -> set[str]:
    """Those of `names` that are temporary names, for unfinished results.

    A folder is filled under such a name. A file has no name until it is whole, where the system supports that; if it
    replaces another, it needs a temporary name for a moment.
    """
    endings = (".part",) if has_files_without_names(folder) and not over else (".part", ".tmp")
    return {name for name in names if name.startswith(".gouache-") and name.endswith(endings)}


def has_files_without_names(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        return False
    return True
