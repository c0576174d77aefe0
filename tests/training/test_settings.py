"""Settings of a run: read from TOML, and bad values refused by name."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gouache.errors import FileError, RequestError
from gouache.training.run_settings import read
from gouache.training.settings import Settings

from .toys import settings


def test_the_table_train_of_a_file_becomes_settings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 9\nbatch = 2\nlearning_rate = 1e-3\nbetas = [0.8, 0.95]\n")

    assert read(path).train == Settings(steps=9, batch=2, learning_rate=1e-3, betas=(0.8, 0.95))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("stepz = 3", r"stepz: is not a setting; did you mean train\.steps"),
        ("steps = 0", "steps.*greater than 0.*received 0"),
        ("steps = 2.5", "steps.*received 2.5"),
        ("learning_rate = 'fast'", "learning_rate.*received 'fast'"),
        ("learning_rate = inf", "learning_rate.*finite.*received inf"),
        ("ema_decay = 1.0", "ema_decay.*less than 1"),
        ("betas = [0.9, 1.5]", r"betas\.1.*less than 1"),
        ("schedule = 'linea'", "schedule.*should be constant, linear, cosine, .*or the dotted path.*received 'linea'"),
        ("warmup = -1", "warmup.*greater than or equal to 0"),
        ("rounding = 'nearest'", "rounding.*'master' or 'stochastic'.*received 'nearest'"),
        ("", "learning_rate: is missing"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_and_table(tmp_path, line, words):
    path = tmp_path / "run.toml"
    given = {"steps": "steps = 5", "batch": "batch = 1", "learning_rate": "learning_rate = 1"}
    given.pop(line.split(" ")[0] or "learning_rate", None)
    path.write_text("\n".join(["[train]", *given.values(), line]))

    with pytest.raises(RequestError, match=rf"run\.toml train\.{words}") as caught:
        read(path)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[vae", "is not TOML: "),
        ("a = " + "[" * 100_000, "is not TOML|nested"),
        ("a = " + "1" * 5000, "is not TOML|digits"),
        (None, r"run\.toml: does not exist"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, words):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_text(text)

    with pytest.raises(FileError, match=words):
        read(path)


def test_settings_are_immutable():
    with pytest.raises(ValidationError):
        settings().steps = 7  # type: ignore[misc]


def test_every_setting_may_change_on_resume():
    assert Settings.changeable == frozenset(Settings.model_fields)
