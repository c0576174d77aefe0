"""Runs of a few steps on narrow models and a few small pictures, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gouache.app.settings import Settings
from gouache.app.training import runs
from gouache.app.training.folder import RunFolder
from gouache.app.training.runs import Finished
from gouache.training.run_settings import RunSettings, checked
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
THREE = ((64, 64), (96, 64), (64, 64))


def make_pictures(folder: Path, sizes: Sequence[tuple[int, int]] = THREE) -> Path:
    """Pictures of noise with captions."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zorb, number {number}, red")
    return folder


def settings_of(file: Path, pictures: Path, output: Path, **tables: Any) -> RunSettings:
    usual: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "model": {"name": str(file)},
        "data": {"folder": str(pictures), "resolution": [64], "bucket_step": 8, "workers": 0},
        "train": {"steps": 4, "batch": 2, "learning_rate": 1e-2, "warmup": 0, "log_steps": 1, "validate_steps": 2},
        "samples": {"every": 1000, "steps": 2},
        "memory": {"dtype": "fp32", "autocast": "no"},
        "validation": {"probe": 1, "timesteps": 2},
    }
    merged = _merged(usual, tables)
    return checked({**merged, "adapter": without_effect_removed(merged.get("adapter", {}))})


def small_settings(file: Path, pictures: Path, output: Path, **tables: Any) -> RunSettings:
    """A small adapter, embedding or hypernetwork without averages, saved at every second step."""
    usual = {
        "adapter": {} if tables.get("mode") in ("embedding", "hypernetwork") else {"rank": 2, "alpha": 2},
        "train": {"validate_steps": 4, "save_steps": 2, "ema_decay": 0.0},
    }
    return settings_of(file, pictures, output, **_merged(usual, tables))


def without_effect_removed(adapter: dict[str, Any]) -> dict[str, Any]:
    """`adapter` without the usual rank and alpha where its form has none."""
    absent = {"none": ("rank", "alpha"), "ia3": ("rank", "alpha"), "full": ("rank", "alpha"), "oft": ("alpha",)}
    return {name: value for name, value in adapter.items() if name not in absent.get(adapter.get("form", ""), ())}


def run(
    settings: RunSettings,
    folder: Path,
    user: Settings,
    stop_after: int | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> Finished:
    """Train in `folder`, for at most `stop_after` steps; `notes` receives what the run reports."""
    asked = count()
    usual: dict[str, Any] = {
        "on_note": [].append if notes is None else notes.append,
        "should_stop": lambda: stop_after is not None and next(asked) >= stop_after,
        "overwrite": True,
    }
    return runs.run(settings, RunFolder(folder), user, **{**usual, **options})


def _merged(usual: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    found = dict(usual)
    for name, value in tables.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found
