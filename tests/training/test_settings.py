"""Settings of a run: the learning rate compared with torch's schedulers, and bad values refused by name."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from gouache.errors import FileError, RequestError
from gouache.training.settings import Settings, read

from .toys import settings


def test_a_table_of_a_toml_file_becomes_settings(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[vae]\nsteps = 9\nbatch = 2\nlearning_rate = 1e-3\nbetas = [0.8, 0.95]\n[text]\nsteps = 1\n")

    found = read(path, "vae")

    assert found == Settings(steps=9, batch=2, learning_rate=1e-3, betas=(0.8, 0.95))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("stepz = 3", "stepz.*is not a training setting.*steps, batch"),
        ("steps = 0", "steps.*greater than 0.*got 0"),
        ("steps = 2.5", "steps.*got 2.5"),
        ("learning_rate = 'fast'", "learning_rate.*got 'fast'"),
        ("learning_rate = inf", "learning_rate.*finite.*got inf"),
        ("ema_decay = 1.0", "ema_decay.*less than 1"),
        ("betas = [0.9, 1.5]", "betas.1.*less than 1"),
        ("schedule = 'linear'", "schedule.*'constant' or 'cosine'.*got 'linear'"),
        ("", "learning_rate.*is missing"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_and_table(tmp_path, line, words):
    path = tmp_path / "recipe.toml"
    given = {"steps": "steps = 5", "batch": "batch = 1", "learning_rate": "learning_rate = 1"}
    given.pop(line.split(" ")[0] or "learning_rate", None)
    path.write_text("\n".join(["[vae]", *given.values(), line]))

    with pytest.raises(RequestError, match=rf"recipe.toml \[vae\] {words}") as caught:
        read(path, "vae")

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[text]\nsteps = 1", r"no table \[vae\]; it has text"),
        ("vae = 3", r"no table \[vae\]"),
        ("[vae", "is not TOML: "),
        ("a = " + "[" * 100_000, "is not TOML|nested"),
        ("a = " + "1" * 5000, "is not TOML|digits"),
        ("", r"no table \[vae\]; it has none"),
    ],
)
def test_the_error_for_a_missing_table_lists_the_tables_of_the_file(tmp_path, text, words):
    path = tmp_path / "recipe.toml"
    path.write_text(text)

    with pytest.raises(FileError, match=words):
        read(path, "vae")


def test_the_error_for_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileError, match=r"recipe.toml: does not exist"):
        read(tmp_path / "recipe.toml", "vae")


def test_settings_are_immutable():
    with pytest.raises(ValidationError):
        settings().steps = 7  # type: ignore[misc]


def rates_of_torch(steps: int, rate: float, make) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_cosine_schedule_is_that_of_torch():
    given = settings(steps=200, learning_rate=0.3, schedule="cosine", final_rate=0.1)

    expected = rates_of_torch(200, 0.3, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200, eta_min=0.03))
    assert [given.rate(step) for step in range(200)] == pytest.approx(expected)


def test_the_warmup_is_that_of_torch_and_the_cosine_starts_after_it():
    given = settings(steps=100, learning_rate=0.3, schedule="cosine", final_rate=0.0, warmup=20)

    def both(optimizer):
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=19)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[20])

    expected = rates_of_torch(100, 0.3, both)
    assert [given.rate(step) for step in range(100)] == pytest.approx(expected)


def test_a_constant_rate_is_constant_after_the_warmup():
    given = settings(steps=1000, learning_rate=0.3, schedule="constant", warmup=10)

    assert {given.rate(step) for step in range(9, 1000)} == {0.3}


def test_with_a_warmup_longer_than_the_run_the_rate_only_increases():
    given = settings(steps=5, learning_rate=1.0, schedule="cosine", warmup=10)

    assert [given.rate(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
