"""What `--dry-run` predicts, compared with what runs leave on disk, and how it depends on the settings.

Memory and time are compared with measurements by `benchmarks.dry_run`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gouache.app.settings import Settings
from gouache.app.training import estimate
from gouache.app.training.estimate import Estimate
from gouache.app.training.folder import RunFolder
from gouache.cli import main
from gouache.data.epochs import Plan
from gouache.training.run_settings import template

from .short_runs import Narrows, make_pictures, run, small_settings

WEIGHTS: dict[str, Any] = {"mode": "finetune", "adapter": {"form": "none"}}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


HELD_OUT: dict[str, Any] = {"validation": {"pictures": 1}, "train": {"ema_decay": 0.9, "save_steps": 1, "keep": 3}}


WORD: dict[str, Any] = {"mode": "embedding", "data": {"trigger": "zorb"}}


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param(WORD, marks=pytest.mark.full),
        pytest.param({"mode": "hypernetwork"}, marks=pytest.mark.full),
        pytest.param({**WEIGHTS, **HELD_OUT}, marks=pytest.mark.full),
    ],
)
def test_the_disk_is_what_a_run_then_takes(
    tables: dict[str, Any], narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    output = tmp_path / ("out.pt" if tables.get("mode") == "hypernetwork" else "out.safetensors")
    chosen = small_settings(narrow("sd1").file, pictures, output, **tables)
    found = estimate.estimate(chosen, RunFolder(tmp_path / "run"), settings, on_note=lambda line: None)
    assert found.fits and found.step_seconds > 0 and not (tmp_path / "run").exists()
    run(chosen, tmp_path / "run", settings)

    steps = list((tmp_path / "run").glob("step-*"))
    assert found.checkpoints == len(steps)
    assert found.checkpoints * found.checkpoint_bytes == pytest.approx(sum(map(size, steps)), rel=0.15, abs=8192)
    assert found.cache_bytes == pytest.approx(size(tmp_path / "run" / "cache"), rel=0.15, abs=4096)


def memory(file: Path, pictures: Path, user: Settings, monkeypatch: pytest.MonkeyPatch, **tables: Any) -> Estimate:
    monkeypatch.setattr(estimate, "available", lambda device: 1)  # nothing is run
    monkeypatch.setattr("gouache.app.training.memory_use._own_memory", lambda: 0)
    chosen = small_settings(file, pictures, Path("out.safetensors"), **tables)
    return estimate.estimate(chosen, RunFolder(Path("none")), user, on_note=lambda line: None)


@pytest.mark.full  # six simulations
def test_memory_depends_on_the_settings(
    narrow: Narrows, pictures: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    def of(**tables: Any) -> int:
        tables["data"] = {"resolution": [256], "cache": True}
        return memory(narrow("sd1").file, pictures, settings, monkeypatch, **tables).memory_bytes

    usual = of(train={"batch": 2})
    assert of(train={"batch": 1}) < usual
    assert of(train={"batch": 2}, memory={"checkpointing": True}) < usual
    trained = of(train={"batch": 2}, **WEIGHTS)
    assert trained > usual
    assert of(train={"batch": 2, "ema_decay": 0.9}, **WEIGHTS) > trained
    assert of(train={"batch": 2, "optimizer": "adafactor"}, **WEIGHTS) < trained


@pytest.mark.full
def test_checkpointing_lowers_the_memory(
    narrow: Narrows, pictures: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    data, file = {"resolution": [256]}, narrow("sd1").file
    kept, again = (
        memory(file, pictures, settings, monkeypatch, data=data, memory={"checkpointing": checkpointing}).memory_bytes
        for checkpointing in (False, True)
    )
    assert again < kept


def test_what_does_not_fit_is_named_with_what_to_change_and_the_exit_code_is_1(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors", **WEIGHTS)
    (tmp_path / "run.toml").write_text(template(chosen))
    monkeypatch.setattr(estimate, "available", lambda device: 50_000_000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: estimate.shutil._ntuple_diskusage(9, 9, 1_000_000))
    monkeypatch.setattr("sys.argv", ["gouache", "train", "run", str(tmp_path / "run.toml"), "--dry-run"])

    with pytest.raises(SystemExit) as ended:
        main.main()

    assert ended.value.code == 1
    advice = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice")]
    assert len(advice) == 2
    assert "disk" in advice[0] and "train.keep" in advice[0]
    assert "memory" in advice[1] and "adapter.form = lora" in advice[1] and "train.batch below 2" in advice[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_timed_steps_are_those_that_are_frequent_in_an_epoch(accumulate: int) -> None:
    sizes = [*[(64, 64)] * 9, *[(64, 32)] * 5, (32, 64)]
    plan = Plan(sizes, [1] * len(sizes), 4, lambda epoch: torch.Generator().manual_seed(epoch))
    rows = [SimpleNamespace(crop=SimpleNamespace(size=size)) for size in sizes]
    train = SimpleNamespace(steps=100, accumulate=accumulate)

    class FakeBatches:
        def __len__(self) -> int:
            return len(plan)

    batches = FakeBatches()
    batches.plan, batches.rows = plan, rows  # type: ignore[attr-defined]
    found = estimate._kinds(SimpleNamespace(batches=batches, settings=SimpleNamespace(train=train)))  # type: ignore[arg-type]

    def shapes(batch: int) -> list[tuple[tuple[int, int], int]]:
        members = [plan.batch(number)[1] for number in range(batch, batch + accumulate)]
        return sorted((sizes[each[0]], len(each)) for each in members)

    steps = [shapes(step * accumulate) for step in range(len(plan) // accumulate)]
    for batch, count in found:
        assert steps.count(shapes(batch)) == count
    timed = [shapes(batch) for batch, _ in found]
    assert len(timed) == 3 and all(timed.count(each) == 1 for each in timed)
    assert max(steps.count(each) for each in steps) == found[0][1]
