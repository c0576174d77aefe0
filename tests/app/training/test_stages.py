"""Trainings in stages: what each starts from, exact resume across borders, lineage, status, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gouache
from gouache.app import names
from gouache.app.settings import Settings
from gouache.app.training import estimate, lineage, opening, report, runs, stages
from gouache.app.training.estimate import Estimate
from gouache.app.training.folder import RunFolder, opened
from gouache.app.training.stage_checks import check
from gouache.app.training.stage_file import read, to_do
from gouache.app.training.stage_status import all_status, estimate_all, estimate_lines, fits, lines
from gouache.errors import GouacheError
from gouache.files.record import sha256_of
from gouache.training import memory
from gouache.training.run_settings import RunSettings, checked
from tests.app.training.short_runs import make_pictures
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
# As SD 2.1 was made of SD 2.0: a strict filter first, then a mild one, at another size and rate.
TWO = """
[[stages]]
name = "strict"
data = {{ filter = ["punsafe<0.1"] }}

[[stages]]
name = "mild"
data = {{ filter = ["punsafe<0.98"], resolution = [96], flip = true }}
train = {{ steps = 3, learning_rate = 1e-3 }}
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions and scores in a metadata file."""
    sizes = ((64, 64), (96, 64), (64, 96), (64, 64), (80, 64))
    pictures = make_pictures(tmp_path_factory.mktemp("scored") / "pictures", sizes)
    rows = [
        {"file_name": path.name, "text": path.with_suffix(".txt").read_text(), "punsafe": number / 4}
        for number, path in enumerate(sorted(pictures.glob("*.png")))
    ]
    for path in pictures.glob("*.txt"):
        path.unlink()
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return pictures


def written(folder: Path, model: Path, pictures: Path | str, text: str = TWO, keys: str = "") -> Path:
    """A file of stages in `folder`."""
    folder.mkdir(exist_ok=True)
    values = {"output": "last.safetensors", "model": model, "pictures": pictures, "keys": keys}
    (folder / "two.toml").write_text((BASE + text).format(**values))
    return folder / "two.toml"


@pytest.fixture
def write(narrow: Narrows, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A file of stages in a folder of its own, which is the present one."""

    def make(text: str = TWO, keys: str = "", pictures: Path | str = scored) -> Path:
        file = written(tmp_path / "b", narrow("sd1").file, pictures, text, keys)
        monkeypatch.chdir(file.parent)
        return file

    return make


@pytest.fixture(scope="module")
def whole(narrow: Narrows, scored: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two stages were trained without a stop."""
    file = written(tmp_path_factory.mktemp("stages") / "whole", narrow("sd1").file, scored)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(file.parent)
        patch.setattr(memory, "trim", lambda: None)
        finished = go(file, settings)
    assert finished.path == Path("last.safetensors") and finished.step == 3
    return file.parent


@pytest.fixture
def copied(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a training whose first stage is done."""
    folder = tmp_path / "copied"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "runs/two/mild")
    (folder / "last.safetensors").unlink()
    monkeypatch.chdir(folder)
    return folder / "two.toml"


def go(path: Path, user: Settings, stop_after: int | None = None, **options: Any) -> runs.Finished:
    asked = count()
    usual = {"on_note": [].append, "should_stop": lambda: stop_after is not None and next(asked) >= stop_after}
    return stages.run(path, user, **{**usual, **options})


def stored(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_equal_results(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert stored(one)["gouache.stages"] == stored(two)["gouache.stages"]


def begun(folder: Path, name: str) -> Any:
    return json.loads((folder / f"runs/two/{name}/metadata.json").read_text())


def test_each_stage_starts_from_the_result_before_and_says_so(whole: Path):
    first, last = whole / "runs/two/strict.safetensors", whole / "last.safetensors"
    entries = json.loads(stored(last)["gouache.stages"])
    assert [(each["name"], each["mode"], each["steps"]) for each in entries] == [
        ("strict", "finetune", 2),
        ("mild", "finetune", 3),
    ]
    assert entries[1]["start"] == sha256_of(first) and entries[0]["data"] != entries[1]["data"]
    assert json.loads(stored(first)["gouache.stages"]) == entries[:1]
    assert [begun(whole, name)["ss_num_train_images"] for name in ("strict", "mild")] == ["1", "4"]
    assert [begun(whole, name)["ss_resolution"] for name in ("strict", "mild")] == ["(64, 64)", "(96, 96)"]
    run = RunFolder(whole / "runs/two/mild").settings()
    assert (run.model.name, run.model.sha256) == (str(first), sha256_of(first))


@pytest.mark.parametrize(("kind", "names"), [("hashed", {}), ("plain", {"data_name": "private", "start_name": "x.pt"})])
def test_names_of_the_users_files_are_in_plain_lineages_alone(kind: str, names: dict[str, str]):
    values = {
        "lineage": kind,
        "model": {"name": "/home/x.pt"},
        "data": {"folder": "/home/private"},
        "train": {"steps": 1, "batch": 1, "learning_rate": 1e-4},
    }
    before = [{"name": "first"}]
    *kept, last = json.loads(lineage.extended({"gouache.stages": json.dumps(before)}, checked(values), "0123"))
    assert kept == before and {name: last.get(name) for name in names} == names
    assert ("private" in json.dumps(last)) == bool(names) and len(last["settings"]) == 64


class Killed(BaseException):
    """Ends a training where a signal would."""


def kill_before(name: str) -> Callable[..., None]:
    def begin(stage: str, number: int, count: int) -> None:
        if stage == name:
            raise Killed

    return begin


def test_a_training_killed_between_and_within_stages_ends_bit_equal(
    write: Any, whole: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the export of the first stage; then in the second one, where the first one's result is lost too."""
    file, folder = write(), tmp_path / "b"
    with pytest.raises(Killed):
        go(file, settings, on_stage=kill_before("mild"))
    rows = [row.split()[:6] for row in lines(all_status(file))]
    assert rows[1][:6] == ["strict", "finetune", "finished", "2", "of", "2"]
    assert rows[2][:7] == ["mild", "finetune", "not", "started", "0", "of"]
    log = (folder / "runs/two/strict/log.jsonl").read_text()
    assert go(file, settings, stop_after=1).path is None
    assert [each.to_json()["run"]["state"] for each in all_status(file)] == ["finished", "stopped"]
    (folder / "runs/two/strict.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    began = list[str]()
    ended = go(folder / "runs/two", settings, on_stage=lambda name, number, count: began.append(name))
    assert ended.path is not None and began == ["strict", "mild"]
    assert (folder / "runs/two/strict/log.jsonl").read_text() == log  # it was exported, not trained
    for name in ("runs/two/strict.safetensors", "last.safetensors"):
        assert_equal_results(folder / name, whole / name)


@pytest.mark.full
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_training_stopped_anywhere_ends_bit_equal(
    stop: int, write: Any, whole: Path, settings: Settings, tmp_path: Path
):
    file = write()
    assert go(file, settings, stop_after=stop).path is None
    go(file, settings)
    assert_equal_results(tmp_path / "b/last.safetensors", whole / "last.safetensors")


def started(file: Path, user: Settings, *launcher: str) -> subprocess.Popen[str]:
    """The command line in the folder of `file`."""
    homes = {
        "PYTHONPATH": Path(gouache.__file__).parents[1],
        "HOME": user.data.parent,
        "GOUACHE_DATA": user.data,
        "GOUACHE_OUTPUT": user.output,
    }
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "gouache", "train", "run", file.name], cwd=file.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(path) for name, path in homes.items()}},
    )  # fmt: skip


@pytest.mark.full
def test_the_command_killed_by_sigkill_and_by_ctrl_c_goes_on_bit_equal(
    write: Any, whole: Path, settings: Settings, tmp_path: Path
):
    file, run = write(), tmp_path / "b/runs/two"
    for sign, wait_for in (
        (signal.SIGKILL, run / "strict/log.jsonl"),
        (signal.SIGKILL, run / "strict.safetensors"),
        (signal.SIGINT, run / "mild/log.jsonl"),
    ):
        running = started(file, settings)
        while not wait_for.exists() and running.poll() is None:
            time.sleep(0.002)
        running.send_signal(sign)
        _, errors = running.communicate(timeout=120)
        if sign == signal.SIGINT and running.returncode:
            assert running.returncode == 130 and "to go on: gouache train run two.toml" in errors
    last = started(file, settings)
    output, errors = last.communicate(timeout=120)
    assert (last.returncode, output) == (0, "last.safetensors\n"), errors
    assert_equal_results(tmp_path / "b/last.safetensors", whole / "last.safetensors")


@pytest.mark.full
def test_two_processes_train_all_stages_and_report_once(write: Any, settings: Settings, tmp_path: Path):
    file = write()
    running = started(file, settings, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output, errors = running.communicate(timeout=240)
    assert (running.returncode, output) == (0, "last.safetensors\n"), errors
    assert errors.count("stage strict, 1 of 2") == errors.count("stage mild, 2 of 2") == 1
    entries = json.loads(stored(tmp_path / "b/last.safetensors")["gouache.stages"])
    assert entries[1]["start"] == sha256_of(tmp_path / "b/runs/two/strict.safetensors")


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
    _, found = read(write(TWO + more))
    assert [None if each.start is None else each.start.name for each in found] == [None, "strict", "strict", None]
    assert found[2].settings.model.name == str(found[0].result)
    assert found[3].settings.model.name == str(narrow("sd1").file)


@pytest.mark.full
def test_the_estimate_has_the_sum_of_the_stages_that_are_not_done(write: Any, copied: Path, settings: Settings):
    one = list(estimate_lines(estimate_all(copied, settings, on_note=[].append)))
    assert one[0] == "stage mild" and one[-1].startswith("in all  3 steps, ")
    file = write()
    found = estimate_all(file, settings, on_note=[].append)
    assert list(estimate_lines(found))[-1].startswith("in all  5 steps") and fits(found)
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize(("disk_free", "is_enough"), [(129, False), (130, True)])
def test_all_stages_together_must_fit_on_the_disk(
    disk_free: int, is_enough: bool, write: Any, narrow: Narrows, settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Each alone fits. A model that is not trained yet is measured as the one before it."""
    sizes = {"cache_bytes": 5, "checkpoint_bytes": 10, "checkpoints": 4, "output_bytes": 20, "disk_free": disk_free}
    models = list[str]()

    def measured(chosen: RunSettings, folder: RunFolder, user: Settings, **_: Any) -> Estimate:
        models.append(chosen.model.name)
        return Estimate(
            steps=chosen.train.steps, epochs=1, pictures=1, class_pictures=0, step_seconds=60, memory_bytes=1,
            mapped_bytes=0, memory_free=2, device="cpu", advice=(), **sizes,
        )  # fmt: skip

    monkeypatch.setattr(estimate, "estimate", measured)
    found = estimate_all(write(), settings, on_note=[].append)
    *_, total = [line for line in estimate_lines(found) if line.startswith("in all")]
    assert total == "in all  5 steps, 5 min, 130 bytes of disk"
    short = [(stage, dataclasses.replace(each, step_seconds=0.1)) for stage, each in found]
    assert "time    0.2 s, 0.10 s per step" in "\n".join(estimate_lines(short))
    assert any(line.startswith("in all  5 steps, 0.5 s, ") for line in estimate_lines(short))
    assert fits(found) == is_enough
    assert any(line.startswith("advice") for line in estimate_lines(found)) != is_enough
    assert models == [str(narrow("sd1").file)] * 2


ONE = """
[[stages]]
name = "a"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stages]]\nname = 5\n", r"stage 1 name: is missing or not a plain name"),
        ('[[stages]]\nname = "stages.toml"\n', r"stage 1 name: stages\.toml is the name of a file"),
        (ONE + '[[stages]]\nname = "A"\n', r"stage 2 name: A is that of two stages"),
        (ONE + 'start = "b"\n', r"stage a: start: 'b' is not an earlier stage"),
        (ONE + 'start = ["b"]\n', r"stage a: start: .* is not an earlier stage"),
        (ONE + '[[stages]]\nname = "b"\nstart = "a"\nmodel = {{ name = "mini" }}\n', r"stage b: start: excludes model"),
        (ONE + "train = {{ step = 5 }}\n", r"stage a: train\.step: is not a setting; did you mean"),
        (ONE + "pretrain = 5\n", r"stage a: pretrain: is 5; expected a table"),
        (ONE + 'data = {{ folder = "gone" }}\n', r"stage a: data\.folder: 'gone' does not exist"),
        ("stages = 5\n", r"has no \[\[stages\]\]"),
        (
            ONE + 'mode = "lora"\nadapter = {{ form = "lora" }}\n[[stages]]\nname = "b"\n',
            r"stage b: start: a gives no model: its result is of the kind adapter \(mode = lora, adapter.form = lora\)",
        ),
        (ONE + 'output = "no/such.safetensors"\n', r"stage a: no/such\.safetensors: cannot be written"),
        (ONE + 'output = "last.safetensors"\n[[stages]]\nname = "b"\n', r"stage b: output: .* is that of stage a too"),
        (TWO.replace("punsafe<0.98", "punsafe<-1"), r"stage mild: filter: no picture is left with punsafe<-1"),
        (TWO.replace("punsafe<0.98", "beauty>1"), r"stage mild: filter: .*beauty"),
        (TWO.replace("steps = 3", 'optimizer = "none such"'), r"stage mild: .*none such"),
        (TWO.replace("flip = true", 'folder = ""'), r"stage mild: data\.folder: is missing"),
        (TWO.replace("[96]", "[7]"), r"stage mild: .*7"),
    ],
)  # fmt: skip
def test_impossible_files_are_refused_before_anything_begins(
    text: str, message: str, write: Any, settings: Settings, tmp_path: Path
):
    file = write("", keys=text.format()) if text.startswith("stages") else write(text)
    with pytest.raises(GouacheError, match=message) as caught:
        go(file, settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "b/runs").exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps = 2\n", "steps = -3\n", r"two\.toml \(shared\) train\.steps: "),
        ('mode = "finetune"', 'mode = "fine"', r"two\.toml \(shared\) mode: "),
        ("[samples]", "[sampless]", r"two\.toml \(shared\) sampless: is not a setting; "),
        ("learning_rate = 1e-2", "learning_rate = nan", r"two\.toml \(shared\) train\.learning_rate: "),
        ("bucket_step = 8", "bucket_step = 0", r"two\.toml \(shared\) data\.bucket_step: "),
        ('folder = "', 'folder = "gone', r"stage strict \(shared\): data\.folder: 'gone.*' does not exist"),
        ("steps = 3", "steps = -3", r"two\.toml stage mild: train\.steps: "),
        ("batch = 2\n", "", r"two\.toml stage strict: train\.batch: is missing"),
        (
            'name = "strict"',
            'name = "strict"\n[[stage]]',
            r"two\.toml \(shared\) stage: .* did you mean \[\[stages\]\]",
        ),
    ],
)
def test_a_fault_is_named_where_it_is_written(before: str, after: str, message: str, write: Any, settings: Settings):
    file = write()
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(GouacheError, match=message):
        go(file, settings)


def test_a_misspelt_table_of_stages_is_recognised(write: Any):
    file = write()
    file.write_text(file.read_text().replace("[[stages]]", "[[stage]]"))
    with pytest.raises(GouacheError, match=r"stage: is not a setting; did you mean \[\[stages\]\]\?"):
        opening.opened(file, [])


@pytest.mark.parametrize("begun", [True, False])
def test_where_one_run_is_meant_one_of_the_stages_has_to_be_named(begun: bool, tmp_path: Path, settings: Settings):
    """For `export`, `compare` and `paint -m`."""
    folder = tmp_path / "three"
    (folder / "vae").mkdir(parents=True)
    (folder / "stages.toml").touch()
    if begun:
        (folder / "vae" / "settings.toml").touch()
    ending = f"such as {folder / 'vae'}" if begun else "none has begun"
    for use in (opened, lambda path: report.entry(f"{path}"), lambda path: report.entry(f"{path}@last"),
                lambda path: names.resolve(str(path), settings)):  # fmt: skip
        with pytest.raises(GouacheError, match=f"three is a training in stages; name one of them.*{ending}"):
            use(folder)


def test_a_result_of_a_middle_stage_does_not_replace_a_file_of_the_user(write: Any, settings: Settings):
    file = write(ONE + 'output = "mine.safetensors"\n[[stages]]\nname = "b"\n')
    mine = file.with_name("mine.safetensors")
    mine.write_bytes(b"mine")
    with pytest.raises(GouacheError, match=r"stage a: .*mine\.safetensors already exists"):
        go(file, settings)
    assert mine.read_bytes() == b"mine"


def test_a_file_called_stages_is_not_changed(write: Any, settings: Settings):
    """Only the copy in the folder of the training is written by Gouache."""
    file = write().rename(Path("stages.toml"))
    (file.parent / "strict").mkdir()
    (file.parent / "strict/settings.toml").touch()  # a run of the same name next to it
    before = file.read_text()
    with pytest.raises(Killed):
        go(file, settings, on_stage=kill_before("strict"))
    assert file.read_text() == before and Path("runs/stages/stages.toml").exists()
    assert read(Path("runs/stages/stages.toml"))[0] == Path("runs/stages")


def test_the_copy_in_the_folder_has_absolute_paths(write: Any, settings: Settings, scored: Path, tmp_path: Path):
    """Those of files that are not there yet too; names of models remain names."""
    file = write(TWO, pictures=os.path.relpath(scored, tmp_path / "b"))
    Path("mini").mkdir()  # does not hide the model
    text = file.read_text().replace('name = "mild"', 'name = "mild"\nmodel = { name = "mini" }')
    file.write_text(text.replace("flip = true", 'flip = true, cache_folder = "later"'))
    with pytest.raises(Killed):
        go(file, settings, on_stage=kill_before("strict"))
    found = [stage.settings for stage in read(Path("runs/two"))[1]]
    folders = [Path(each.data.folder) for each in found]
    assert all(each.is_absolute() for each in folders) and {each.resolve() for each in folders} == {scored.resolve()}
    assert found[1].data.cache_folder == str(tmp_path / "b/later") and found[1].model.name == "mini"
    assert found[1].output == str(tmp_path / "b/last.safetensors")


def test_a_finished_stage_needs_neither_its_pictures_nor_its_model(
    copied: Path, scored: Path, settings: Settings, tmp_path: Path
):
    """They may have been removed to make room for the next set."""
    text = (
        copied.read_text().replace(f'"{scored}"', '"gone"').replace("flip = true", f'flip = true, folder = "{scored}"')
    )
    copied.write_text(text.replace('[model]\nname = "', '[model]\nname = "/gone'))
    run = copied.parent / "runs/two/strict/settings.toml"
    run.write_text(run.read_text().replace(f'folder = "{scored}"', f'folder = "{copied.parent / "gone"}"'))
    with pytest.raises(Killed):
        go(copied, settings, on_stage=kill_before("mild"))


def test_a_result_older_than_the_last_checkpoint_is_written_again(copied: Path):
    """As after a kill before the export, where the result of an earlier training remains."""
    first, _ = read(copied)[1]
    assert [each.name for each in to_do(read(copied)[1])] == ["mild"]
    newest = (first.folder.checkpoint(2) / "manifest.json").stat().st_mtime
    os.utime(first.result, (newest - 1, newest - 1))
    assert [each.name for each in to_do(read(copied)[1])] == ["strict", "mild"]


def test_another_setting_of_a_finished_stage_is_refused(copied: Path, settings: Settings):
    copied.write_text(copied.read_text().replace("punsafe<0.1", "punsafe<0.3"))
    with pytest.raises(
        GouacheError, match=r"stage strict: data\.filter: is .* this stage is done and was trained with"
    ):
        go(copied, settings)


@pytest.fixture
def done(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a training of which all stages are done."""
    shutil.copytree(whole, folder := tmp_path / "copied")
    monkeypatch.chdir(folder)
    return folder / "two.toml"


def test_only_the_last_stage_can_be_given_more_steps(done: Path, settings: Settings):
    """What has begun from the results of others would not be of the file any more."""
    text = done.read_text()
    done.write_text(text.replace("steps = 2\n", "steps = 4\n"))
    with pytest.raises(GouacheError, match=r"stage strict.* train\.steps: is 4, but this stage is done"):
        go(done, settings)
    for more in ("steps = 4", "steps = 3, patience = 5"):
        done.write_text(text.replace("steps = 3", more))
        stages_now = read(done)[1]
        check(stages_now, settings, False)
        assert [each.name for each in to_do(stages_now)] == ["mild"]
    done.write_text(text.replace("learning_rate = 1e-3", "learning_rate = 1e-4"))
    with pytest.raises(GouacheError, match=r"stage mild.* train\.learning_rate: is 0\.0001, but this stage is done"):
        go(done, settings)


@pytest.mark.full
def test_a_stage_that_is_done_goes_on_as_its_note_says(done: Path, settings: Settings):
    file, folder, notes = done, done.parent, list[str]()
    go(file, settings, on_note=notes.append)
    assert "all 3 steps are done; to train more: set train.steps = 6 of stage mild in" in notes[-1]
    assert not any("--set" in note for note in notes)
    file.write_text(file.read_text().replace("steps = 3", "steps = 4"))
    assert [each.to_json()["run"]["state"] for each in all_status(file)] == ["finished", "finished"]
    finished = go(file, settings)
    assert (finished.step, finished.path) == (4, Path("last.safetensors"))
    assert json.loads(stored(folder / "last.safetensors")["gouache.stages"])[1]["steps"] == 4


def test_another_model_under_a_finished_stage_is_refused(copied: Path, narrow: Narrows, settings: Settings):
    other = copied.with_name("other.safetensors")
    weights = load_file(model := narrow("sd1").file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other)
    copied.write_text(copied.read_text().replace(str(model), str(other)))
    with pytest.raises(GouacheError, match=r"stage strict: has begun with another file than .*other.* is now: SHA-256"):
        go(copied, settings)


def test_a_stage_trained_from_an_earlier_result_is_refused(done: Path, whole: Path, settings: Settings):
    """Also if all are done: the last result would not be that of the file."""
    folder = done.parent
    shutil.copy(whole / "last.safetensors", folder / "runs/two/strict.safetensors")
    with pytest.raises(
        GouacheError, match=r"stage mild: has begun with another file than .*strict\.safetensors is now"
    ):
        go(folder / "two.toml", settings)
    shutil.rmtree(folder / "runs/two/strict")
    with pytest.raises(
        GouacheError, match=r"stage mild: .* has begun, but strict, which it starts from, is not trained"
    ):
        go(folder / "two.toml", settings)
