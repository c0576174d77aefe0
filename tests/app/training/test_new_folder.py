"""The folder that a new run gets: never that of another run, also of one that was stopped before it trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gouache.app.settings import Settings
from gouache.app.training.opening import absolute_paths, new_folder
from gouache.errors import RequestError
from gouache.training.run_settings import RunSettings, checked, template

BASE: Mapping[str, Any] = {"output": "zorb.safetensors", "model": {"name": "mini"}, "data": {"folder": "pics"},
                           "train": {"steps": 4, "batch": 2, "learning_rate": 1e-3}}  # fmt: skip


def chosen(tables: Mapping[str, Any]) -> RunSettings:
    merged = {name: {**BASE.get(name, {}), **value} if isinstance(value, Mapping) else value
              for name, value in tables.items()}  # fmt: skip
    return checked({**BASE, **merged})


@pytest.fixture
def stopped(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped while it was prepared, which had found the hash of its model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "zorb"
    folder.mkdir(parents=True)
    begun = absolute_paths(chosen({"model": {"sha256": "ab"}}), settings)
    (folder / "settings.toml").write_text(template(begun))
    return folder


@pytest.mark.parametrize(
    "tables",
    [
        {"mode": "embedding", "data": {"trigger": "zorb"}},
        {"data": {"folder": "other"}},
        {"data": {"trigger": "glim"}},
        {"model": {"name": "other"}},
        {"mode": "slider", "slider": {"erase": "zorb"}},
        {"mode": "pretrain", "pretrain": {"part": "vae"}},
    ],
)
def test_another_run_does_not_replace_one_that_was_stopped_early(
    tables: dict[str, Any], stopped: Path, settings: Settings
):
    with pytest.raises(RequestError, match=r"output: runs/zorb is a run already; go on with it: gouache train run"):
        new_folder(chosen(tables), settings)


@pytest.mark.parametrize("tables", [{}, {"train": {"batch": 1}}, {"memory": {"checkpointing": True}}])
def test_the_same_command_or_a_corrected_one_goes_on(tables: dict[str, Any], stopped: Path, settings: Settings):
    assert new_folder(chosen(tables), settings).path.absolute() == stopped
