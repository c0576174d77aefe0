"""Runs of a few steps on narrow models and five small pictures, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gouache.app.settings import Settings
from gouache.app.training import runs
from gouache.app.training.folder import RunFolder
from gouache.app.training.runs import Finished
from gouache.training.run_settings import RunSettings, checked
from tests.app.training.short_runs import without_effect_removed
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]


def make_pictures(folder: Path) -> Path:
    """Three pictures of two shapes with captions."""
    folder.mkdir()
    for number, size in enumerate(((64, 64), (96, 64), (64, 64))):
        levels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zorb, number {number}")
    return folder


def settings_of(file: Path, pictures: Path, output: Path, **tables: Any) -> RunSettings:
    usual: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "model": {"name": str(file)},
        "data": {"folder": str(pictures), "resolution": [64], "bucket_step": 8, "workers": 0},
        "adapter": {"rank": 2, "alpha": 2},
        "train": {"steps": 4, "batch": 2, "learning_rate": 1e-2, "warmup": 0, "log_steps": 1, "validate_steps": 4,
                  "save_steps": 2, "ema_decay": 0.0},
        "samples": {"every": 1000, "steps": 2},
        "memory": {"dtype": "fp32", "autocast": "no"},
        "validation": {"probe": 1, "timesteps": 2},
    }  # fmt: skip
    for name, value in tables.items():
        usual[name] = {**usual.get(name, {}), **value} if isinstance(value, dict) else value
    usual["adapter"] = without_effect_removed(usual.get("adapter", {}))
    return checked(usual)


def run(settings: RunSettings, folder: Path, user: Settings, **options: Any) -> Finished:
    return runs.run(settings, RunFolder(folder), user, **{"on_note": lambda line: None, **options})
