"""What a trained file says of all trainings that led to it, in its metadata: a JSON list, one entry per training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gouache.outside import MalformedText, parse_json
from gouache.training.run_settings import RunSettings

KEY = "gouache.stages"
_MOST = 100  # entries
# What does not change the result, or names files of the user.
_LEFT_OUT: Mapping[str, Any] = {
    "output": True, "device": True, "tensorboard": True, "samples": True, "memory": True, "lineage": True,
    "lineage_name": True,
    "model": {"name", "vae"}, "adapter": {"start"}, "slider": {"file"},
    "data": {"folder", "class_folder", "cache_folder", "cache", "workers"},
}  # fmt: skip


def extended(metadata: Mapping[str, str], settings: RunSettings, data: str) -> str:
    """The entries of the file that training starts from, and that of this training. `data` is a hash of its data set.

    An entry has the name of the stage, the mode, the steps, and hashes of the data, of the file at the start and of
    the settings; with `lineage = plain` also the names of the data and of that file.
    """
    dumped = json.dumps(settings.model_dump(mode="json", exclude=_LEFT_OUT), sort_keys=True)  # type: ignore[arg-type]
    entry = {
        "name": settings.lineage_name,
        "mode": settings.title,
        "steps": settings.train.steps,
        "data": data,
        "start": settings.model.sha256,
        "settings": hashlib.sha256(dumped.encode()).hexdigest(),
    }
    if settings.lineage == "plain":
        folder = settings.data.folder or settings.slider.file
        entry |= {"data_name": Path(folder).name, "start_name": Path(settings.model.name).name}
    return json.dumps([*entries(metadata), entry][-_MOST:])


def entries(metadata: Mapping[str, str]) -> list[Any]:
    """Those in a file's metadata; none if there are none that can be read."""
    try:
        found = parse_json(metadata.get(KEY, "[]"))
    except MalformedText:
        return []
    return found if isinstance(found, list) else []


def with_steps(metadata: Mapping[str, str], steps: int) -> dict[str, str]:
    """`metadata` whose last entry says how many steps were done."""
    found = entries(metadata)
    if not found or not isinstance(found[-1], dict):
        return dict(metadata)
    return {**metadata, KEY: json.dumps([*found[:-1], {**found[-1], "steps": steps}])}
