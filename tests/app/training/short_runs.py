"""Runs of a few steps on narrow models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gouache.app.settings import Settings
from gouache.app.training import runs
from gouache.app.training.folder import RunFolder
from gouache.app.training.runs import Finished
from gouache.training.run_settings import RunSettings, checked


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
    for name, value in tables.items():
        usual[name] = {**usual.get(name, {}), **value} if isinstance(value, dict) else value
    usual["adapter"] = without_effect_removed(usual.get("adapter", {}))
    return checked(usual)


def without_effect_removed(adapter: dict[str, Any]) -> dict[str, Any]:
    """`adapter` without the usual rank and alpha where its form has none."""
    absent = {"none": ("rank", "alpha"), "ia3": ("rank", "alpha"), "full": ("rank", "alpha"), "oft": ("alpha",)}
    return {name: value for name, value in adapter.items() if name not in absent.get(adapter.get("form", ""), ())}


def run(
    settings: RunSettings, folder: Path, user: Settings, stop_after: int | None = None, notes: list[str] | None = None
) -> Finished:
    """Train in `folder`, for at most `stop_after` steps; `notes` receives what the run reports."""
    done = 0

    def stop() -> bool:
        nonlocal done
        done += 1
        return stop_after is not None and done > stop_after

    return runs.run(
        settings,
        RunFolder(folder),
        user,
        on_note=[].append if notes is None else notes.append,
        should_stop=stop,
        overwrite=True,
    )
