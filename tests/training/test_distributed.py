"""Two processes train as one does with their batches together; only the first of them writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gouache.errors import RequestError
from gouache.training import state
from gouache.training.batch import part_rows
from gouache.training.distributed import ALONE, World, processes

from .data_sets import Encoders, batches, data_set
from .processes import STEPS, captioned, denoising, go, go_all, in_processes, part_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of two processes in `two`, and those of one in `one`."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    go(ALONE, "regression", one / "regression")
    go(ALONE, "denoising", one / "denoising")
    two.mkdir()
    go(ALONE, "pieces", one / "pieces")
    go(ALONE, "denoising", two / "one then two", 8)
    go(ALONE, "pieces", two / "one then sharded", 8)
    assert in_processes(go_all, two) == [2, 1]  # the last run is one in which the second process fails
    go(ALONE, "denoising", two / "two then one")
    go(ALONE, "pieces", two / "sharded then one")
    return folder


def weights(run: Path, file: str = "weights") -> Mapping[str, Tensor]:
    return state.read(run / f"step-{STEPS:08d}").tensors[file]


EQUALS = {
    "regression": "regression", "denoising": "denoising", "two then one": "denoising", "one then two": "denoising",
    "sharded": "pieces", "sharded then one": "pieces", "one then sharded": "pieces",
}  # fmt: skip
"""Runs in which two processes take part, and those of one process that they equal."""


@pytest.mark.parametrize("name", EQUALS)
@pytest.mark.parametrize("file", ["weights", "ema", "optimizer"])
def test_two_processes_train_what_one_does_with_their_batches_together(trained: Path, name: str, file: str):
    """Short batches, batches with a row for one process only, masks, dropped captions, a prior, clipping, averages."""
    expected = weights(trained / "one" / EQUALS[name], file)
    found = weights(trained / "two" / name, file)

    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


def test_each_process_writes_its_part_of_sharded_weights(trained: Path):
    parts = sorted((trained / "two" / "sharded" / f"step-{STEPS:08d}").glob("*/*.safetensors"))
    sizes = {f"{part.parent.name} {part.name[:11]}": len(load_file(part)) for part in parts}
    assert set(sizes) == {f"{kind} shard-0000{rank}" for kind in ("weights", "ema", "optimizer") for rank in (1, 2)}
    rows = [load_file(part)["unet.conv_in.weight"].shape[0] for part in parts if part.parent.name == "weights"]
    assert rows == [4, 4]


def test_the_log_of_two_processes_has_the_losses_of_the_whole_batches(trained: Path):
    logs = [
        [json.loads(line) for line in (trained / name / "denoising" / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["step"] for line in logs[1]] == list(range(1, STEPS + 1))
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
        assert "prior" in two and "norm" in two


def test_a_change_of_the_number_of_processes_is_recorded(trained: Path):
    for name, before, after in (("two then one", 2, 1), ("one then two", 1, 2)):
        newest = state.newest(trained / "two" / name)
        assert newest is not None and newest.values["processes"] == after
        change = {"step": 8, "name": "run.processes", "before": before, "after": after}
        assert newest.values["changes"] == [change]


def test_caches_are_made_once_by_all_processes_together(trained: Path):
    made = [(trained / "two" / "cache" / f"made by {rank}").read_text().split() for rank in range(2)]
    pictures, texts = ([int(each[column]) for each in made] for column in (0, 1))
    assert sum(pictures) == 7 and sum(texts) == 8
    assert min(pictures) >= 3 and min(texts) >= 4
    assert not list((trained / "two" / "cache").rglob(".gouache-shared*"))


def test_the_parts_of_a_batch_are_its_rows_and_their_mean_loss_is_that_of_the_batch(tmp_path: Path):
    """Five rows per batch in three processes; some batches are shorter than that."""
    values: dict[str, Any] = {"batch": 5, "caption": lambda record, *_: "word " * (1 + 9 * (record.name == "3.png"))}
    records = data_set(tmp_path, repeats=3)
    source = batches(records, None, **values)
    worlds = [World(rank, 3, rank, 3) for rank in range(3)]

    def chunks(text: str) -> int:
        return max(1, math.ceil(len(text.split()) / 4))

    parts = [batches(records, None, Encoders(), world=world, chunks=chunks, **values) for world in worlds]
    seen = set()
    for number in range(len(source)):
        whole, shares = source(number), [part(number) for part in parts]
        assert whole.conditioning is not None and whole.weights is not None
        seen.add(len(whole))
        latents, contexts, names, total = [], [], [], 0.0
        for world, share in zip(worlds, shares):
            assert share.conditioning is not None and share.weights is not None
            if part_rows(world.rank, 3, len(whole)):
                latents.append(share.latents)
                contexts.append(share.conditioning.context)
                names += share.names
            else:
                assert not share.weights.any()
            total += float((share.weights * share.latents.mean((1, 2, 3))).mean()) / 3
        assert torch.equal(torch.cat(latents), whole.latents) and tuple(names) == whole.names
        assert torch.equal(torch.cat(contexts), whole.conditioning.context)
        assert total == pytest.approx(float((whole.weights * whole.latents.mean((1, 2, 3))).mean()), abs=1e-6)
    assert min(seen) < 3 and max(seen) == 5


@pytest.mark.parametrize("number", range(4))
def test_the_losses_of_parts_average_to_those_of_the_batch(number: int):
    objective, _ = denoising()
    with torch.no_grad():
        whole = objective.losses(captioned(number), number)
        parts = [objective.losses(part_of(captioned(number), World(rank, 2)), number) for rank in range(2)]

    assert all(part.keys() == whole.keys() for part in parts)
    for name, value in whole.items():
        assert sum(float(part[name]) for part in parts) / 2 == pytest.approx(float(value), rel=1e-5)


def test_an_error_in_one_process_ends_all_with_one_message(trained: Path):
    error = (trained / "two" / "errors").read_text()
    assert error.count("Traceback") == 1 and "ValueError: broken" in error


def test_ctrl_c_in_one_process_stops_all_with_a_checkpoint(trained: Path):
    folder = trained / "two" / "stopped"
    ends = {(folder / f"signal {rank}").read_text() for rank in range(2)}
    assert len(ends) == 1
    step, signal = ends.pop().split()
    assert signal == "2" and [path.name for path in state.checkpoints(folder)] == [f"step-{int(step):08d}"]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: is not in the environment"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK: is 2; expected"),
    ],
)
def test_an_incomplete_environment_is_refused(variables: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=found), processes():
        pass


def test_a_process_that_was_started_alone_connects_to_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as world:
        assert world == ALONE
        assert not torch.distributed.is_initialized()
        assert world.highest(1.0, 2.0) == (1.0, 2.0) and world.all_of("a") == ["a"]
