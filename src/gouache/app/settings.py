"""The user's settings, read once by the entry points and passed along as a value.

They come from environment variables, else from `config.toml` in the user's configuration folder: GOUACHE_MODELS
(folders, separated as in PATH), GOUACHE_OUTPUT, GOUACHE_DEVICE, GOUACHE_DTYPE, GOUACHE_DATA. The Hugging Face cache is
found by HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME, as by huggingface_hub.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from gouache.app import folders
from gouache.errors import FileError, RequestError, printable
from gouache.outside import MalformedText, parse_toml, read_text

DATABASE = "library.sqlite"  # in the data folder
KEYS = ("models", "output", "device", "dtype")


@dataclass(frozen=True)
class Settings:
    """`models`: folders in which names are looked up, the first match wins; the last one is Gouache's own.

    `cache`: files that may be deleted at any time. `data`: the library's database and the installed models. `hub`: the
    Hugging Face cache, searched last; None not to search it.
    """

    models: tuple[Path, ...]
    output: Path
    device: str | None
    dtype: str | None
    cache: Path
    data: Path
    hub: Path | None = None


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings.

    Raises FileError for a config file with an unknown key or a value of the wrong type, RequestError for a variable
    that is not a possible path, or a user without a home folder.
    """
    path = _from_variable(environment, "GOUACHE_CONFIG") or _of_user(platformdirs.user_config_path) / "config.toml"
    table = _table(path)
    data = _from_variable(environment, "GOUACHE_DATA") or _of_user(platformdirs.user_data_path)
    if variable := environment.get("GOUACHE_MODELS"):
        configured = [_path(each, "GOUACHE_MODELS") for each in variable.split(os.pathsep) if each]
    else:
        configured = [_path(each, f"models in {path}") for each in table.get("models", []) if each]
    output = _from_variable(environment, "GOUACHE_OUTPUT") or _path(table.get("output", "outputs"), f"output in {path}")
    return Settings(
        models=tuple(dict.fromkeys((*configured, *folders.added(data), data / "models"))),
        output=output,
        device=environment.get("GOUACHE_DEVICE") or table.get("device"),
        dtype=environment.get("GOUACHE_DTYPE") or table.get("dtype"),
        cache=_of_user(platformdirs.user_cache_path),
        data=data,
        hub=_hub(environment),
    )


def _hub(environment: Mapping[str, str]) -> Path | None:
    if cache := _from_variable(environment, "HF_HUB_CACHE"):
        return cache
    if home := _from_variable(environment, "HF_HOME"):
        return home / "hub"
    if cache := _from_variable(environment, "XDG_CACHE_HOME"):
        return cache / "huggingface" / "hub"
    try:
        return Path("~/.cache/huggingface/hub").expanduser()
    except RuntimeError:  # no home folder
        return None


def _from_variable(environment: Mapping[str, str], name: str) -> Path | None:
    return _path(environment[name], name) if environment.get(name) else None


def _path(text: str, source: str) -> Path:
    """`text` as a path, with ~ expanded. `source` names where it comes from in the message of a RequestError."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise RequestError(source, f"{printable(text)} is in the home folder of an unknown user") from None
    try:
        path.stat()
    except ValueError:
        raise RequestError(source, f"{printable(text)} is not a possible path") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise RequestError(source, f"{printable(text)} is not a possible path: {error.strerror}") from None
    return path  # it need not exist


def _of_user(folder: Any) -> Path:
    try:
        path: Path = folder("gouache")
    except RuntimeError:
        path = Path("~")
    if path.parts[:1] == ("~",):
        user = os.getuid() if hasattr(os, "getuid") else "this one"
        raise RequestError("HOME", f"is not set, and the system has no home folder for user {user}; set HOME")
    return path


def _table(path: Path) -> dict[str, Any]:
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        table = parse_toml(read_text(path))
    except MalformedText as error:
        raise FileError(path, str(error)) from None
    for key, value in table.items():
        if key not in KEYS:
            raise FileError(path, f"unknown key {printable(key, 60)!r}; the keys are {', '.join(KEYS)}")
        expected = "a list of folders" if key == "models" else "a string"
        texts = value if key == "models" else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError(path, f"{key} is {printable(repr(value), 80)}; expected {expected}")
    return table
