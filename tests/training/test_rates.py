"""Learning rates compared with the schedulers of torch and transformers, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gouache.errors import RequestError
from gouache.training.loop import train
from gouache.training.rates import SCHEDULES, steps_of

from .toys import points, regression, settings


def rates(steps: int = 200, **values: Any) -> list[float]:
    given = settings(**{"steps": steps, "learning_rate": 0.3, "final_rate": 0.0, **values})
    return [given.rate(step) for step in range(steps)]


def rates_of_others(make, steps: int = 200, rate: float = 0.3) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_cosine_schedule_is_that_of_torch():
    expected = rates_of_others(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200, eta_min=0.03))

    assert rates(schedule="cosine", final_rate=0.1) == pytest.approx(expected)


def test_the_warmup_is_that_of_torch_and_the_cosine_starts_after_it():
    def both(optimizer):
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=19)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[20])

    assert rates(100, schedule="cosine", warmup=20) == pytest.approx(rates_of_others(both, 100))


def test_a_warmup_below_one_is_a_share_of_the_steps():
    assert rates(schedule="linear", warmup=0.1) == rates(schedule="linear", warmup=20)
    assert (steps_of(0.25, 10), steps_of(1, 10), steps_of(7, 10), steps_of(0, 10)) == (2, 1, 7, 0)


def test_a_constant_rate_is_constant_after_the_warmup():
    assert set(rates(schedule="constant", warmup=10)[9:]) == {0.3}


def test_with_a_warmup_longer_than_the_run_the_rate_only_increases():
    for name in SCHEDULES:
        found = rates(5, schedule=name, warmup=10, learning_rate=1.0)
        assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5]), name


WARMUP = 20


@pytest.mark.parametrize(
    ("values", "make"),
    [
        ({"schedule": "linear"}, lambda t, o: t.get_linear_schedule_with_warmup(o, WARMUP, 200)),
        ({"schedule": "cosine"}, lambda t, o: t.get_cosine_schedule_with_warmup(o, WARMUP, 200)),
        (
            {"schedule": "cosine", "restarts": 3},
            lambda t, o: t.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, 200, num_cycles=4),
        ),
        (
            {"schedule": "cosine", "final_rate": 0.2},
            lambda t, o: t.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, 200, min_lr_rate=0.2),
        ),
        (
            {"schedule": "polynomial", "power": 3.0, "final_rate": 0.1},
            lambda t, o: t.get_polynomial_decay_schedule_with_warmup(o, WARMUP, 200, lr_end=0.03, power=3.0),
        ),
        (
            {"schedule": "warmup-stable-decay", "decay": 50, "final_rate": 0.1},
            lambda t, o: t.get_wsd_schedule(
                o, WARMUP, num_decay_steps=50, num_training_steps=200, decay_type="linear", min_lr_ratio=0.1
            ),
        ),
        ({"schedule": "inverse-sqrt"}, lambda t, o: t.get_inverse_sqrt_schedule(o, WARMUP)),
    ],
    ids=["linear", "cosine", "restarts", "floor", "polynomial", "wsd", "inverse-sqrt"],
)
def test_schedules_are_those_of_transformers_after_the_warmup(values, make):
    transformers = pytest.importorskip("transformers.optimization")

    found = rates(warmup=WARMUP, **values)

    assert found[WARMUP:] == pytest.approx(rates_of_others(lambda o: make(transformers, o))[WARMUP:])
    assert found[:WARMUP] == pytest.approx([0.3 * (step + 1) / WARMUP for step in range(WARMUP)])


def test_rex_is_the_formula_of_its_paper():
    # Chen et al. 2021: (1 - z) / (1/2 + 1/2 (1 - z))
    z = [step / 200 for step in range(200)]

    assert rates(schedule="rex") == pytest.approx([0.3 * (1 - each) / (0.5 + 0.5 * (1 - each)) for each in z])


def test_cosine_with_restarts_ends_at_its_floor_and_stays_there():
    given = settings(steps=100, learning_rate=1.0, schedule="cosine", restarts=3, final_rate=0.1)

    # A run whose steps were reduced below its present step never gets the full rate again.
    assert [given.rate(step) for step in (100, 101, 5000)] == pytest.approx([0.1] * 3)
    assert given.rate(25) == given.rate(50) == given.rate(75) == 1.0


@pytest.mark.parametrize(
    ("path", "arguments", "make"),
    [
        (
            "torch.optim.lr_scheduler.StepLR", {"step_size": 30, "gamma": 0.5},
            lambda o: torch.optim.lr_scheduler.StepLR(o, 30, 0.5),
        ),
        (
            "torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 0.7, "total_steps": 201},
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.7, 201),
        ),
        (
            "transformers.get_linear_schedule_with_warmup", {"num_warmup_steps": 7, "num_training_steps": 150},
            lambda o: pytest.importorskip("transformers").get_linear_schedule_with_warmup(o, 7, 150),
        ),
    ],
)  # fmt: skip
def test_a_schedule_by_its_path_gives_its_own_rates(path, arguments, make):
    pytest.importorskip(path.partition(".")[0])

    assert rates(schedule=path, schedule_arguments=arguments) == pytest.approx(rates_of_others(make))


def test_an_imported_schedule_starts_after_the_warmup_and_resumes_at_its_step(tmp_path):
    values = {
        "schedule": "torch.optim.lr_scheduler.ExponentialLR", "schedule_arguments": {"gamma": 0.5}, "warmup": 2,
        "learning_rate": 0.08,
    }  # fmt: skip
    assert rates(6, **values) == pytest.approx([0.04, 0.08, 0.08, 0.04, 0.02, 0.01])

    whole = train(regression(), points, settings(**values), tmp_path / "whole")
    train(regression(), points, settings(steps=4, **values), tmp_path / "parts")
    parts = train(regression(9), points, settings(**values), tmp_path / "parts")

    torch.testing.assert_close(dict(parts.last), dict(whole.last), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("path", "arguments", "words"),
    [
        ("no.such.Schedule", {}, "no.such.Schedule cannot be imported"),
        ("torch.optim.lr_scheduler.StepLR", {}, "StepLR cannot be used: .*step_size"),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {}, "ReduceLROnPlateau cannot be used: .*metrics"),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "total_steps": 3}, "OneCycleLR cannot be used"),
        ("torch.nn.Linear", {"out_features": 3}, "torch.nn.Linear cannot be used"),
    ],
)
def test_a_schedule_that_cannot_be_used_is_refused_before_the_first_step(tmp_path, path, arguments, words):
    given = settings(schedule=path, schedule_arguments=arguments)

    with pytest.raises(RequestError, match=f"schedule: .*{words}") as caught:
        train(regression(), lambda number: pytest.fail("a batch was requested"), given, tmp_path)

    assert "\n" not in str(caught.value)
