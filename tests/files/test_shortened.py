"""A file that becomes shorter while it is read is an error in one line, not the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gouache.errors import FileError
from gouache.files.open import open_model
from gouache.files.source import Source


@pytest.fixture(params=["safetensors", "zip", "legacy"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = {f"t{index}": torch.full((1 << 20,), float(index)) for index in range(4)}
    path = tmp_path / ("m.safetensors" if request.param == "safetensors" else "m.ckpt")
    if request.param == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


@pytest.mark.parametrize("size", [0, 1 << 20, 3 << 20])  # less than one tensor: torch orders them by their addresses
@pytest.mark.parametrize("how", ["read", "tensor"])
def test_a_shortened_file_is_named(path: Path, size: int, how: str):
    file = open_model(path)
    getattr(file, how)("t0")
    os.truncate(path, size)

    with pytest.raises(FileError, match=r"was changed while it was read: it had [\d,]+ bytes, and now ends after"):
        getattr(file, how)("t3")


def test_a_copied_tensor_survives_and_equals_the_mapped_one(path: Path):
    file = open_model(path)
    for name in file:
        assert torch.equal(file.read(name), file.tensor(name))
    copied = file.read("t3")
    os.truncate(path, 0)

    assert copied.sum() == 3 * (1 << 20)


def test_slices_of_a_shortened_file_raise(path: Path):
    source = Source(path)
    os.truncate(path, 100)

    assert len(source.data[:100]) == 100
    with pytest.raises(FileError, match="was changed while it was read"):
        source.data[50:200]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be shortened there")
def test_writing_a_copy_of_a_shortened_file_is_no_bus_error(path: Path):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from gouache.files.open import open_model\n"
        "from gouache.files.write import stream_safetensors\n"
        "from gouache.errors import FileError\n"
        "path = Path(sys.argv[1]); file = open_model(path)\n"
        "def read(name):\n"
        "    tensor = file.read(name); os.truncate(path, 0); return tensor\n"
        "try:\n"
        "    stream_safetensors(path.with_suffix('.out'), file.tensors, read, {})\n"
        "except FileError as error:\n"
        "    print(error); sys.exit(2)\n"
    )

    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)

    assert done.returncode == 2, done.stderr[-500:]
    assert "was changed while it was read" in done.stdout
