"""Settings of a run: read from TOML, and bad values refused by name."""

from __future__ import annotations

import pytest
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
        ("schedule = 'linea'", "schedule.*should be constant, linear, cosine, .*or the dotted path.*got 'linea'"),
        ("warmup = -1", "warmup.*greater than or equal to 0"),
        ("rounding = 'nearest'", "rounding.*'master' or 'stochastic'.*got 'nearest'"),
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


def test_every_setting_may_change_on_resume():
    assert Settings.changeable == frozenset(Settings.model_fields)
