"""How a run is going, from logs whose numbers are known, and from real runs."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn

from gouache.training.log import Clock, Log, read_lines
from gouache.training.loop import train
from gouache.training.objective import step_generator
from gouache.training.stability import overfitting, read_stability, stability

from .toys import Regression, points, regression, settings


def lines(*losses: float, **more: float):
    return [{"step": 10 * (index + 1), "loss": loss, **more} for index, loss in enumerate(losses)]


def test_slope_and_spread_are_those_of_a_line_with_known_noise():
    rng = random.Random(1)
    log = lines(*(2 - 0.001 * 10 * (index + 1) + rng.gauss(0, 0.1) for index in range(100)))

    found = stability(log, [])

    mean = sum(line["loss"] for line in log) / 100
    assert found.slope == pytest.approx(-1 / mean, rel=0.1)  # -0.001 per step
    assert found.spread == pytest.approx(0.1 / mean, rel=0.2)
    assert found.steps == 1000 and found.remarks == ()


def test_only_the_last_lines_count():
    assert stability(lines(*[100.0] * 50, *[1.0] * 100), []).slope == pytest.approx(0)


def test_a_rising_loss_and_a_burst_of_gradients_are_remarked():
    rising = lines(*(1 + 0.02 * index for index in range(50)), norm=1.0)
    burst = lines(*[1.0] * 50, norm=1.0)
    burst[-3]["norm"] = 50.0

    assert "the loss rises" in stability(rising, []).remarks[0]
    assert "gradients reach 50, their median is 1" in stability(burst, []).remarks[0]


def test_norm_and_gap_are_reported_and_missing_ones_are_none():
    found = stability(lines(1, 1, 1, **{"norm": 0.5, "ema gap": 0.01}), [])

    assert (found.norm, found.ema_gap) == (0.5, 0.01)
    nothing = stability([], [])
    assert (nothing.steps, nothing.slope, nothing.norm, nothing.saving, nothing.remarks) == (0, None, None, None, ())


def times(count: int, **values: float):
    return [{"step": 10 * (index + 1), "seconds": 10.0, **values} for index in range(count)]


def test_shares_of_time_and_what_is_written_per_hour():
    found = stability(lines(1.0), times(20, data=0.1, saving=0.2, saves=1, bytes=1000))

    assert (found.waiting, found.saving) == (pytest.approx(0.01), pytest.approx(0.02))
    assert (found.between, found.bytes_per_hour) == (pytest.approx(10), pytest.approx(360_000))
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("measured", "remark"),
    [
        (times(20, saving=1.0, saves=1), "checkpoints take 10 % of the time: save less often"),
        (times(400), "a crash can cost 67 minutes of work: save more often"),
        (times(20, data=0.5), "5 % of the time is spent waiting for data"),
    ],
)
def test_saving_too_often_or_too_seldom_and_waiting_are_remarked(measured, remark):
    assert any(each.startswith(remark) for each in stability(lines(1.0), measured).remarks)


def validated(held_out: list[float], training: list[float]):
    return [
        {"step": 100 * (index + 1), "validation loss": loss, "validation training loss": trained}
        for index, (loss, trained) in enumerate(zip(held_out, training))
    ]


def test_overfitting_is_a_validation_loss_that_rises_while_the_training_loss_falls():
    found = overfitting(validated([1, 0.8, 0.9, 0.95, 1.0], [1, 0.8, 0.6, 0.5, 0.4]))

    assert found.startswith("over-fitting: since step 200 the validation loss has risen from 0.8 to 1,")
    assert "the training loss fell from 0.8 to 0.4" in found and "\n" not in found


@pytest.mark.parametrize(
    ("held_out", "training"),
    [
        ([1, 0.8, 0.9, 0.95], [1, 0.8, 0.6, 0.5]),  # too few validations since
        ([1, 0.8, 0.9, 0.803, 1.0], [1, 0.8, 0.6, 0.5, 0.4]),  # within the noise
        ([1, 0.8, 0.9, 0.95, 1.0], [1, 0.8, 0.9, 1.0, 1.1]),  # both rise: it diverges
        ([1, 0.9, 0.8, 0.7, 0.6], [1, 0.8, 0.6, 0.5, 0.4]),
        ([], []),
    ],
)
def test_anything_else_is_not_overfitting(held_out, training):
    assert overfitting(validated(held_out, training)) == ""


def test_without_a_probe_the_loss_between_validations_is_the_training_loss():
    log = []
    for index, loss in enumerate([1, 0.8, 0.9, 0.95, 1.0]):
        log += [
            {"step": 100 * index + 50, "loss": 1 - 0.2 * index},
            {"step": 100 * index + 100, "validation loss": loss},
        ]

    assert "the training loss fell from 0.8 to 0.2" in overfitting(log)


def test_a_run_that_overfits_says_so_once_and_after_a_resume_not_again(tmp_path):
    """Twenty weights learn four examples of pure noise; the truth is 0."""
    generator = step_generator(0, 0)
    x, y = torch.randn(4, 20, generator=generator), torch.randn(4, 1, generator=generator)
    unseen = torch.randn(50, 20, generator=generator), torch.zeros(50, 1)

    def fresh() -> Regression:
        net = nn.Linear(20, 1)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        return Regression(net)

    notes: list[str] = []
    for steps in (150, 300):
        objective = fresh()

        @torch.no_grad()
        def validate(objective: Regression = objective):
            held_out, trained = ((objective.net(a) - b).pow(2).mean().item() for a, b in (unseen, (x, y)))
            return {"loss": held_out, "training loss": trained}

        chosen = settings(steps=steps, learning_rate=0.002, validate_steps=10, ema_decay=0, weight_decay=0)
        train(objective, lambda _: (x, y), chosen, tmp_path, validate=validate, on_note=notes.append)

    assert len(notes) == 1 and notes[0].startswith("over-fitting: since step 10 ")


def test_a_run_measures_its_times_and_saves(tmp_path):
    train(regression(), points, settings(steps=40, log_steps=2, save_steps=4, save_seconds=1e9), tmp_path)

    measured = read_lines(tmp_path / "times.jsonl")
    found = read_stability(tmp_path)

    assert [line["step"] for line in measured] == list(range(2, 41, 2))
    assert sum(line["saves"] for line in measured if "saves" in line) == 10
    size = sum(file.stat().st_size for file in (tmp_path / "step-00000040").iterdir())
    assert measured[-1]["bytes"] == pytest.approx(size, rel=0.01)
    assert found.steps == 40 and found.saving is not None and found.waiting is not None
    assert 0 < found.saving < 1 and 0 <= found.waiting < 1
    assert found.ema_gap is not None and found.norm is not None and found.slope is not None
    assert any("checkpoints take" in remark for remark in found.remarks)


def test_the_gap_in_the_log_is_the_distance_of_averages_and_weights(tmp_path):
    result = train(regression(), points, settings(ema_decay=0.9, learning_rate=0.1), tmp_path)

    averages, last = (torch.cat([each[f"net.{name}"].flatten() for name in ("weight", "bias")])
                      for each in (result.weights, result.last))  # fmt: skip
    line = read_lines(tmp_path / "log.jsonl")[-1]
    assert line["ema gap"] == pytest.approx(float((averages - last).norm() / last.norm()), rel=1e-4)


def test_skipped_steps_are_remarked():
    assert stability(lines(1.0, skipped=2), []).remarks == (
        "2 steps skipped, because a loss or gradient was not finite",
    )


def test_a_clock_adds_up_and_starts_anew_after_each_take():
    clock = Clock()
    call = clock.measured("data", lambda number: number + 1)
    with clock.measure("saving"), pytest.raises(ValueError, match="no"), clock.measure("inner"):
        raise ValueError("no")
    assert call(1) == 2
    clock.add("saves", 1)
    clock.add("saves", 1)

    first, second = clock.take(), clock.take()

    assert set(first) == {"seconds", "data", "saving", "inner", "saves"} and first["saves"] == 2
    assert first["seconds"] >= first["saving"] >= first["inner"] >= 0 and set(second) == {"seconds"}


def test_a_log_returns_to_a_step_in_its_file_and_its_lines(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in range(5):
        log.write(step=step, loss=float(step))

    log.return_to(2)

    assert [line["step"] for line in log.lines] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
