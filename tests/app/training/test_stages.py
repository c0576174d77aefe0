"""Trainings in stages: what each starts from, exact resume across borders, lineage, status, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gouache.app.settings import Settings
from gouache.app.training import runs, stages
from gouache.errors import GouacheError
from gouache.files.record import sha256_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
BASE = """
mode = "finetune"
output = "{output}"
device = "cpu"
{keys}
[model]
name = "{model}"

[data]
folder = "{pictures}"
resolution = [64]
bucket_step = 8
workers = 0

[adapter]
form = "none"

[train]
steps = 2
batch = 2
learning_rate = 1e-2
warmup = 0
log_steps = 1
validate_steps = 2
ema_decay = 0.5

[samples]
every = 100
steps = 1

[memory]
dtype = "fp32"
autocast = "no"

[validation]
probe = 1
timesteps = 1
"""
# As SD 2.1 was made of SD 2.0: a strict filter first, then a mild one, at other rates.
TWO = """
[[stages]]
name = "strict"
data = {{ filter = ["punsafe<0.1"] }}

[[stages]]
name = "mild"
data = {{ filter = ["punsafe<0.98"], flip = true }}
train = {{ steps = 3, learning_rate = 1e-3 }}
"""


@pytest.fixture
def scored(pictures: Path) -> Path:
    """The pictures with captions and scores in a metadata file."""
    rows = [
        {"file_name": path.name, "text": path.with_suffix(".txt").read_text(), "punsafe": number / 4}
        for number, path in enumerate(sorted(pictures.glob("*.png")))
    ]
    for path in pictures.glob("*.txt"):
        path.unlink()
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return pictures


@pytest.fixture
def write(narrow: Narrows, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A file of stages in a folder of its own, which is the present one."""

    def make(text: str = TWO, place: str = "a", keys: str = "", **values: Any) -> Path:
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        usual = {"output": "last.safetensors", "model": narrow("sd1").file, "pictures": scored, "keys": keys}
        (folder / "two.toml").write_text((BASE + text).format(**{**usual, **values}))
        return folder / "two.toml"

    return make


def go(path: Path, user: Settings, stop_after: int | None = None, notes: list[str] | None = None) -> runs.Finished:
    asked = count()
    return stages.run(
        path, user, on_note=[].append if notes is None else notes.append,
        should_stop=lambda: stop_after is not None and next(asked) >= stop_after,
    )  # fmt: skip


def stored(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_equal_weights(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_each_stage_starts_from_the_result_before_and_says_so(write: Any, settings: Settings, tmp_path: Path):
    file = write()
    finished = go(file, settings)
    assert finished.path == Path("last.safetensors") and finished.step == 3
    first, last = tmp_path / "a/runs/two/strict.safetensors", tmp_path / "a/last.safetensors"
    counts = [len(stages.read(file)[1]), len(json.loads(stored(last)["gouache.stages"]))]
    assert counts == [2, 2]
    entries = json.loads(stored(last)["gouache.stages"])
    assert [(each["mode"], each["steps"]) for each in entries] == [("finetune", 2), ("finetune", 3)]
    assert entries[1]["start"] == sha256_of(first) and entries[0]["data"] != entries[1]["data"]
    assert json.loads(stored(first)["gouache.stages"]) == entries[:1]
    pictures = [json.loads((tmp_path / f"a/runs/two/{name}/metadata.json").read_text()) for name in ("strict", "mild")]
    assert [each["ss_num_train_images"] for each in pictures] == ["1", "4"]


@pytest.mark.parametrize("stop", [*(pytest.param(each, marks=pytest.mark.full) for each in (1, 3)), 4])
def test_a_training_stopped_anywhere_ends_bit_equal(stop: int, write: Any, settings: Settings, tmp_path: Path):
    """In the first stage, at its end, in the second one; and from another folder, as after a restart."""
    go(write(), settings)
    file = write(place="b")
    stopped = go(file, settings, stop_after=stop)
    assert stopped.path is None
    ended = go(tmp_path / "b/runs/two", settings)
    assert ended.path is not None
    assert_equal_weights(tmp_path / "a/last.safetensors", tmp_path / "b/last.safetensors")


def test_a_result_that_was_lost_is_exported_again_and_a_finished_stage_is_not_trained_again(
    write: Any, settings: Settings, tmp_path: Path
):
    """As after a kill between the last checkpoint of a stage and its export."""
    file = write()
    go(file, settings)
    first = tmp_path / "a/runs/two/strict.safetensors"
    weights, log = load_file(first), (tmp_path / "a/runs/two/strict/log.jsonl").read_text()
    first.unlink()
    go(file, settings)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(first).items())
    assert (tmp_path / "a/runs/two/strict/log.jsonl").read_text() == log


def test_the_status_of_all_stages_is_one_table(write: Any, settings: Settings):
    file = write()
    go(file, settings, stop_after=4)
    rows = list(stages.lines(stages.all_status(file)))
    assert [row.split()[:3] for row in rows[1:]] == [
        ["strict", "finetune", "finished"],
        ["mild", "finetune", "stopped"],
    ]
    assert "2 of 2" in rows[1] and "of 3" in rows[2]
    values = [each.to_json() for each in stages.all_status(file)]
    assert [value["run"]["state"] for value in values] == ["finished", "stopped"]


def test_a_stage_may_start_from_any_earlier_one_or_from_a_model_of_its_own(write: Any, narrow: Narrows):
    more = """
    [[stages]]
    name = "other"
    start = "strict"
    mode = "lora"
    adapter = {{ form = "lora", rank = 2 }}

    [[stages]]
    name = "own"
    model = {{ name = "{model}" }}
    """
    _, found = stages.read(write(TWO + more))
    starts = [None if each.start is None else each.start.name for each in found]
    assert starts == [None, "strict", "strict", None]
    assert found[2].settings.model.name == str(found[0].result) and found[3].settings.model.name == str(
        narrow("sd1").file
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stages]]\nname = 5\n", r"stage 1 name: is missing or not a plain name"),
        ('[[stages]]\nname = "a"\n[[stages]]\nname = "a"\n', r"stage 2 name: a is that of two stages"),
        ('[[stages]]\nname = "a"\nstart = "b"\n', r"stage 1 start: 'b' is not an earlier stage"),
        ('[[stages]]\nname = "a"\ntrain = {{ step = 5 }}\n', r"stage a: train\.step: is not a setting; did you mean"),
        ('[[stages]]\nname = "a"\ndata = {{ folder = "gone" }}\n', r"stage a: data\.folder: 'gone' does not exist"),
        ('stages = 5\n', r"has no \[\[stages\]\]"),
        (
            '[[stages]]\nname = "a"\nmode = "lora"\nadapter = {{ form = "lora" }}\n[[stages]]\nname = "b"\n',
            r"stage 2 start: a gives no model but a file of mode lora",
        ),
    ],
)  # fmt: skip
def test_impossible_files_are_refused_before_anything_begins(
    text: str, message: str, write: Any, settings: Settings, tmp_path: Path
):
    file = write("", keys=text.format()) if text.startswith("stages") else write(text)
    with pytest.raises(GouacheError, match=message) as caught:
        go(file, settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "a/runs").exists()


def test_another_setting_of_a_finished_stage_is_refused(write: Any, settings: Settings):
    go(write(), settings, stop_after=4)
    file = write(TWO.replace("punsafe<0.1", "punsafe<0.3"))
    with pytest.raises(
        GouacheError, match=r"stage strict: data\.filter: is .* this stage is done and was trained with"
    ):
        go(file, settings)
