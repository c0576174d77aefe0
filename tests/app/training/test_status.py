"""What `status` says of runs that train, were killed, ended early, or have not begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gouache.app.training.folder import RunFolder
from gouache.app.training.status import status
from gouache.training import state
from gouache.training.run_settings import checked, template


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    settings = checked({"train": {"steps": 100, "batch": 1, "learning_rate": 1e-3, "patience": 3}})
    (tmp_path / "settings.toml").write_text(template(settings))
    return RunFolder(tmp_path)


def log(run: RunFolder, *lines: dict[str, float], name: str = "log.jsonl") -> None:
    (run.path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def checkpoint(run: RunFolder, step: int, **values: object) -> None:
    run.checkpoint(step).mkdir()
    (run.checkpoint(step) / "state.json").write_text(json.dumps({"step": step, **values}))
    (run.checkpoint(step) / "weights.safetensors").write_bytes(bytes(1000))


def test_a_run_that_has_not_begun(run: RunFolder):
    found = status(run)
    assert (found.state, found.step, found.loss, found.saved, found.finished) == ("not started", 0, None, (), False)
    assert list(found.lines()) == ["lora, not started: step 0 of 100 (0%)", "no checkpoint yet"]


def test_a_pretraining_is_named_with_its_part(run: RunFolder):
    values = {"mode": "pretrain", "pretrain": {"part": "vae"}, "train": {"steps": 9, "batch": 1, "learning_rate": 1}}
    run.settings_file.write_text(template(checked(values)))
    assert next(iter(status(run).lines())).startswith("pretrain vae, not started")


def test_a_killed_run_has_half_a_line_and_goes_on_from_its_checkpoint(run: RunFolder):
    log(
        run, {"step": 39, "rate": 1e-3, "loss": 0.5, "norm": 1.0}, {"step": 40, "rate": 5e-4, "loss": 0.25, "norm": 2.0}
    )
    with run.log_file.open("a") as file:
        file.write('{"step": 41, "ra')
    checkpoint(run, 30)
    found = status(run)
    assert (found.state, found.step, found.loss, found.rate, found.saved) == ("stopped", 40, 0.25, 5e-4, (30,))
    assert found.bytes == 1000 + (run.checkpoint(30) / "state.json").stat().st_size


@pytest.mark.skipif("sys.platform == 'win32'", reason="no flock")
def test_a_run_that_trains_states_the_time_left(run: RunFolder):
    log(run, *({"step": step, "loss": 1.0} for step in range(1, 11)))
    log(run, *({"step": step, "seconds": 2.0, "saves": 0} for step in range(1, 11)), name="times.jsonl")
    with state.locked(run.path):
        found = status(run)
    assert found.state == "running" and found.left == pytest.approx(90 * 2.0)
    assert "180 s left" in next(iter(found.lines())) or "3 min left" in next(iter(found.lines()))
    assert status(run).state == "stopped"


def test_a_run_that_patience_ended_names_its_best_step(run: RunFolder):
    losses = {10: 0.5, 20: 0.3, 30: 0.4, 40: 0.35, 50: 0.36}
    log(run, *({"step": step, "validation loss": loss} for step, loss in losses.items()))
    checkpoint(run, 20)
    checkpoint(run, 50, waiting=3, ranking=[[0.3, 20]])
    found = status(run)
    assert (found.state, found.finished, found.best, found.best_step) == ("stopped early", True, 0.3, 20)
    assert found.validation == 0.36 and run.best_step() == 20
    assert "validation loss 0.36, lowest 0.3 at step 20" in list(found.lines())


def test_over_fitting_and_changes_are_named(run: RunFolder):
    lines = [{"step": 10 * n, "validation loss": 0.3 + 0.02 * n, "validation training loss": 0.3 - 0.02 * n}
             for n in range(1, 7)]  # fmt: skip
    log(run, *lines)
    change = {"step": 20, "name": "settings.learning_rate", "before": 1e-3, "after": 1e-4}
    checkpoint(run, 60, changes=[change])
    found = status(run)
    assert any(remark.startswith("over-fitting: since step 10") for remark in found.remarks)
    assert found.changes == ("step 20: settings.learning_rate 0.001 -> 0.0001",)


def test_json_has_every_number_and_can_be_read(run: RunFolder):
    log(run, *({"step": step, "rate": 1e-3, "loss": 1 / step, "norm": 2.0, "ema gap": 0.1} for step in range(1, 31)))
    values = json.loads(json.dumps(status(run).to_json()))
    assert values["state"] == "stopped" and values["remarks"] == [] and values["path"] == str(run.path)
    assert {"slope", "spread", "ema_gap", "norm", "waiting", "saving", "between", "bytes_per_hour"} <= set(
        values["stability"]
    )
    assert (values["stability"]["norm"], values["stability"]["ema_gap"], values["window"]) == (2.0, 0.1, 29)
