"""TensorBoard files, read without tensorboardX: records with checksums, and the fields of protocol buffers."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gouache.app.settings import Settings
from gouache.app.training import tensorboard
from gouache.app.training.folder import RunFolder
from gouache.errors import RequestError
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
pytest.importorskip("tensorboardX")


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum (RFC 3720), bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """The checksum as TensorFlow's records have it."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        content, check = data[12 : 12 + size], data[12 + size : 16 + size]
        if size < 2000:  # bit by bit is slow for pictures
            assert struct.unpack("<I", check)[0] == masked(content)
        yield content
        data = data[16 + size :]


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: integers of varints, bytes of everything else."""

    def varint() -> int:
        nonlocal data
        value = shift = 0
        while True:
            byte, data = data[0], data[1:]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while data:
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind)
        size = varint() if size is None else size
        yield number, data[:size]
        data = data[size:]


def events(folder: Path) -> tuple[list[tuple[int, str, float]], dict[tuple[int, str], Image.Image]]:
    """(step, tag, value) of all scalars in order, and the pictures by (step, tag); event.proto and summary.proto."""
    scalars: list[tuple[int, str, float]] = []
    images: dict[tuple[int, str], Image.Image] = {}
    (path,) = folder.glob("events.out.tfevents.*")
    for record in records(path):
        event = dict(fields(record))
        for number, value in fields(event.get(5, b"")):
            assert number == 1
            summary = dict(fields(value))
            step, tag = event.get(2, 0), summary[1].decode()
            if 2 in summary:
                scalars.append((step, tag, struct.unpack("<f", summary[2])[0]))
            if 4 in summary:
                images[step, tag] = Image.open(io.BytesIO(dict(fields(summary[4]))[4]))
    return scalars, images


def test_a_resumed_run_has_each_number_of_its_log_once_and_in_order(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    folder = tmp_path / "run"
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2}, tensorboard="yes",
        samples={"every": 2, "steps": 1}, train={"save_steps": 2, "ema_decay": 0.0},
    )  # fmt: skip
    run(chosen, folder, settings, stop_after=3)
    (folder / "step-00000003").rename(tmp_path / "removed")  # as if the run was killed after step 3
    run(chosen, folder, settings)

    scalars, images = events(folder / "tensorboard")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = [
        (line["step"], tensorboard.tag(name), pytest.approx(value, rel=1e-6))
        for line in lines for name, value in line.items() if name != "step"
    ]  # fmt: skip
    assert scalars == expected
    assert {step for step, *_ in scalars} == {1, 2, 3, 4}
    assert {"train/loss", "train/rate", "train/norm", "validation/loss"} <= {tag for _, tag, _ in scalars}
    assert sorted(images) == [(step, "samples/00") for step in (0, 2, 4)]
    sample = Image.open(folder / "samples/step-00000004-00.png").convert("RGB")
    assert np.array_equal(np.asarray(images[4, "samples/00"]), np.asarray(sample))


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path: Path):
    run_folder = RunFolder(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    run_folder.tensorboard.write_text("a file")
    notes: list[str] = []
    with tensorboard.Board(run_folder, notes.append) as board:
        board.update(now=True)
        board.update(now=True)
    assert len(notes) == 1 and notes[0].startswith("no more TensorBoard files: ")


def test_asking_for_them_without_the_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="tensorboardX"):
        tensorboard.is_wanted("yes")
    assert not tensorboard.is_wanted("auto") and not tensorboard.is_wanted("no")


@pytest.mark.parametrize(
    ("name", "tag"),
    [("loss", "train/loss"), ("ema gap", "train/ema_gap"), ("validation raw loss at 62", "validation/raw_loss_at_62")],
)
def test_measurements_are_grouped(name: str, tag: str):
    assert tensorboard.tag(name) == tag
