"""Settings come from the environment, else from the file, else from the platform's defaults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gouache.app.settings import read
from gouache.errors import FileError, RequestError


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
        ("models = ", "is not TOML"),
        ("\xff", "is not text in UTF-8"),
        ("a = " + "[" * 20_000, "is not TOML"),
        ("models = 1" + "0" * 5000, "is not TOML"),
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


@pytest.mark.parametrize("value", ["~nobody_zz/x", "x" * 5000, "/" + "y" * 300, "a\0b"])
@pytest.mark.parametrize(
    "name", ["GOUACHE_MODELS", "GOUACHE_OUTPUT", "GOUACHE_DATA", "GOUACHE_CONFIG", "HF_HUB_CACHE", "HF_HOME"]
)
def test_an_impossible_path_is_refused_with_the_name_of_its_variable(name: str, value: str):
    with pytest.raises(RequestError) as caught:
        read({name: value})

    assert caught.value.setting == name and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["~nobody_zz/x", "x" * 5000, "a\\u0000b"])
def test_an_impossible_path_in_the_file_is_refused_with_its_key(value: str, tmp_path: Path):
    path = tmp_path / "config.toml"
    for key, text in (("models", f'["{value}"]'), ("output", f'"{value}"')):
        path.write_text(f"{key} = {text}")
        with pytest.raises(RequestError, match=f"{key} in .*config.toml"):
            read({"GOUACHE_CONFIG": str(path)})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
@pytest.mark.parametrize("name", ["config.toml", "folders.json"])
def test_what_is_not_a_regular_file_is_refused(name: str, tmp_path: Path):
    pipe, endless = tmp_path / "pipe" / name, tmp_path / "endless" / name
    for path in (pipe, endless):
        path.parent.mkdir()
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")

    for path in (pipe, endless):
        environment = {"GOUACHE_CONFIG": str(path), "GOUACHE_DATA": str(path.parent)}
        with pytest.raises(FileError, match="not a regular file"):
            read(environment)


@pytest.mark.skipif(os.name != "posix", reason="the home folder is found in another way")
def test_a_user_without_a_home_folder_is_told_to_set_one():
    code = "import os; from gouache.app.settings import read; os.setuid(54321); read()"
    if os.getuid() != 0:
        pytest.skip("only root can become an unknown user")
    environment = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("XDG_")}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert done.stderr.splitlines()[-1] == (
        "gouache.errors.RequestError: HOME: is not set, and the system has no home folder for user 54321; set HOME"
    )
