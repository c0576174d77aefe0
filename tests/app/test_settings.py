"""Settings come from the environment, else from the file, else from the platform's defaults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gouache.app.settings import read
from gouache.errors import FileError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('models = ["/one", "/two"]\noutput = "/pictures"\ndevice = "cpu"\ndtype = "bf16"\n')
    return path


def test_defaults_without_a_file(home: Path):
    settings = read({})

    assert settings.models == (home / "gouache" / "models",)
    assert settings.output == Path("outputs")
    assert (settings.device, settings.dtype) == (None, None)
    assert settings.cache == home / "gouache"


def test_the_folders_of_the_file_come_before_the_default_one(config: Path):
    settings = read({"GOUACHE_CONFIG": str(config)})

    assert settings.models[:2] == (Path("/one"), Path("/two")) and len(settings.models) == 3
    assert (settings.output, settings.device, settings.dtype) == (Path("/pictures"), "cpu", "bf16")


def test_the_environment_takes_precedence_over_the_file(config: Path):
    settings = read(
        {
            "GOUACHE_CONFIG": str(config),
            "GOUACHE_MODELS": os.pathsep.join(["/three", "", "/four"]),
            "GOUACHE_OUTPUT": "/elsewhere",
            "GOUACHE_DEVICE": "cuda:1",
            "GOUACHE_DTYPE": "fp16",
        }
    )

    assert settings.models[:2] == (Path("/three"), Path("/four")) and len(settings.models) == 3
    assert (settings.output, settings.device, settings.dtype) == (Path("/elsewhere"), "cuda:1", "fp16")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models = ", "cannot be read as TOML"),
        ("\xff", "cannot be read as TOML"),
        ('moddels = ["/one"]', "unknown key 'moddels'; the keys are models, output, device, dtype"),
        ('models = "/one"', "models is '/one'; expected a list of folders"),
        ("models = [1]", "expected a list of folders"),
        ("output = 5", "output is 5; expected a string"),
        ("device = ['cpu']", "expected a string"),
    ],
)
def test_an_invalid_file_is_refused_in_one_line(text: str, reason: str, tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="latin-1")

    with pytest.raises(FileError) as caught:
        read({"GOUACHE_CONFIG": str(path)})

    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
