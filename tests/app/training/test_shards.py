"""Runs on tar shards, from the command line's settings to the file: streamed, filtered, stopped within a shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from gouache.app.settings import Settings
from gouache.app.training import defaults
from gouache.errors import RequestError
from tests.app.training.short_runs import Narrows, run, small_settings
from tests.data.tars import damaged, encoded, write


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of five samples; one has a damaged picture and one is to be filtered out."""
    for shard in range(2):
        members = dict[str, bytes | str]()
        for number in range(5):
            picture = encoded(5 * shard + number, ((64, 64), (96, 64))[number % 2])
            members[f"{number}.png"] = damaged(picture) if (shard, number) == (1, 2) else picture
            members[f"{number}.json"] = json.dumps({"caption": f"zorb {number}", "punsafe": number / 10})
        write(tmp_path / "shards" / f"set-{shard:03d}.tar", members)
    return tmp_path / "shards"


def test_a_stream_that_is_stopped_within_a_shard_ends_alike(
    narrow: Narrows, shards: Path, settings: Settings, tmp_path: Path
):
    output = tmp_path / "zorb.safetensors"
    chosen = small_settings(
        narrow("sd1").file, shards / "set-{000..001}.tar", output, train={"steps": 4},
        data={"stream": True, "cache": False, "window": 1, "workers": 2, "filter": ["punsafe<0.35"]},
        validation={"pictures": 1, "timesteps": 2},
    )  # fmt: skip
    notes = list[str]()
    run(chosen, tmp_path / "whole", settings, notes=notes)
    first = hashlib.sha256(output.read_bytes()).hexdigest()
    run(chosen, tmp_path / "parts", settings, stop_after=2)
    run(chosen, tmp_path / "parts", settings)

    assert hashlib.sha256(output.read_bytes()).hexdigest() == first
    assert "punsafe<0.35: 2 of 10 pictures left out" in notes
    assert any(note.startswith("8 pictures are read from shards as they are needed") for note in notes)
    assert sum("set-001.tar/2.png" in note and "counts nothing" in note for note in notes) == 1
    assert list((settings.cache / "shards").iterdir()) and not (tmp_path / "whole" / "cache" / "latents").exists()


def test_a_large_set_is_streamed_without_a_cache(
    narrow: Narrows, shards: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    work = list[tuple[str, int, int]]()

    def chosen():
        pattern, model = str(shards / "set-{000..001}.tar"), str(narrow("sd1").file)
        return defaults.choose(
            "lora", pattern, model, output=None, trigger="", class_word="", steps=2, overrides=[], settings=settings,
            on_work=lambda *done: work.append(done),
        )  # fmt: skip

    found = chosen()
    assert (found.data.stream, found.data.cache, found.output) == (False, True, "set.safetensors")
    assert work == [("indexing shards", 1, 2), ("indexing shards", 2, 2)]
    monkeypatch.setattr(defaults, "LARGE", 9)
    assert (chosen().data.stream, chosen().data.cache) == (True, False)


def test_only_shards_are_streamed(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "a.safetensors", data={"stream": True})
    with pytest.raises(RequestError, match=r"data.stream: is true, and .* has no tar shards"):
        run(chosen, tmp_path / "run", settings)
