"""The user's settings, read once at the edge and passed along as a value.

From `config.toml` in the user's configuration folder, then from environment variables, which win:
GOUACHE_MODELS (folders, separated as in PATH), GOUACHE_OUTPUT, GOUACHE_DEVICE, GOUACHE_DTYPE.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from gouache.errors import FileError

KEYS = ("models", "output", "device", "dtype")


@dataclass(frozen=True)
class Settings:
    """`models`: folders that names are looked up in, first match wins. `cache`: what may be deleted at any time."""

    models: tuple[Path, ...]
    output: Path
    device: str | None
    dtype: str | None
    cache: Path


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read settings now. Raises FileError for a config file with an unknown key or a wrong type."""
    path = Path(environment.get("GOUACHE_CONFIG") or platformdirs.user_config_path("gouache") / "config.toml")
    table = _table(path)
    own = platformdirs.user_data_path("gouache") / "models"
    folders = environment.get("GOUACHE_MODELS")
    named = [Path(each) for each in folders.split(os.pathsep) if each] if folders else table.get("models", [])
    return Settings(
        models=(*(Path(each).expanduser() for each in named), own),
        output=Path(environment.get("GOUACHE_OUTPUT") or table.get("output", "outputs")).expanduser(),
        device=environment.get("GOUACHE_DEVICE") or table.get("device"),
        dtype=environment.get("GOUACHE_DTYPE") or table.get("dtype"),
        cache=platformdirs.user_cache_path("gouache"),
    )


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(path, f"is not TOML that can be read: {error}") from None
    for key, value in table.items():
        if key not in KEYS:
            raise FileError(path, f"has an unknown key {key!r}; there are {', '.join(KEYS)}")
        expected = "a list of folders" if key == "models" else "a text"
        texts = value if key == "models" else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError(path, f"{key} is {value!r}; {expected} is expected")
    return table
