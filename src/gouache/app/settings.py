"""The user's settings, read once by the entry points and passed along as a value.

They come from environment variables, else from `config.toml` in the user's configuration folder: GOUACHE_MODELS
(folders, separated as in PATH), GOUACHE_OUTPUT, GOUACHE_DEVICE, GOUACHE_DTYPE, GOUACHE_DATA. The Hugging Face cache is
found by HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME, as by huggingface_hub.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from gouache.app import folders
from gouache.errors import FileError

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
    """Read the settings. Raises FileError for a config file with an unknown key or a value of the wrong type."""
    path = Path(environment.get("GOUACHE_CONFIG") or platformdirs.user_config_path("gouache") / "config.toml")
    table = _table(path)
    data = Path(environment.get("GOUACHE_DATA") or platformdirs.user_data_path("gouache"))
    variable = environment.get("GOUACHE_MODELS")
    configured = variable.split(os.pathsep) if variable else table.get("models", [])
    every = (*(Path(each).expanduser() for each in configured if each), *folders.added(data), data / "models")
    return Settings(
        models=tuple(dict.fromkeys(every)),
        output=Path(environment.get("GOUACHE_OUTPUT") or table.get("output", "outputs")).expanduser(),
        device=environment.get("GOUACHE_DEVICE") or table.get("device"),
        dtype=environment.get("GOUACHE_DTYPE") or table.get("dtype"),
        cache=platformdirs.user_cache_path("gouache"),
        data=data,
        hub=_hub(environment),
    )


def _hub(environment: Mapping[str, str]) -> Path:
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(path, f"cannot be read as TOML: {error}") from None
    for key, value in table.items():
        if key not in KEYS:
            raise FileError(path, f"unknown key {key!r}; the keys are {', '.join(KEYS)}")
        expected = "a list of folders" if key == "models" else "a string"
        texts = value if key == "models" else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError(path, f"{key} is {value!r}; expected {expected}")
    return table
