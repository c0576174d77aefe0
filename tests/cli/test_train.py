"""`gouache train`: its commands as typed, what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gouache as package
from gouache.app.settings import Settings
from gouache.app.training import opening, prepare
from gouache.app.training.folder import RunFolder
from gouache.cli.training_progress import TrainingProgress
from gouache.errors import RequestError
from gouache.training import run_settings, state
from gouache.training.loop import Progress
from tests.cli.conftest import Command
from tests.pipelines import Narrow

# Few steps on 64 pixels, with samples of one step.
SHORT = [
    "--set", "resolution=[64]", "--set", "samples.steps=1", "--set", "rank=2", "--set", "data.workers=0",
    "--set", "validation.timesteps=1", "--set", "validation.probe=1", "--set", "samples.every=1000",
]  # fmt: skip


@pytest.fixture
def model(narrow: Callable[[str], Narrow]) -> Path:
    return narrow("sd1").file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    for number in range(3):
        levels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(levels).save(tmp_path / f"pics/{number}.png")
        (tmp_path / f"pics/{number}.txt").write_text(f"zorb, number {number}")
    return tmp_path / "pics"


def after(condition: Callable[[], bool], action: Callable[[], Any]) -> threading.Thread:
    """A thread that acts once the condition holds."""

    def wait() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not condition():
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_one_command_trains_and_ends_with_the_file_and_the_command_that_paints(
    gouache: Command, data: Path, model: Path, tmp_path: Path
):
    ended = gouache("train", "lora", "pics", "-m", model, "--trigger", "zorb", "--steps", 2, *SHORT)
    assert (ended.code, ended.out) == (0, "pics.safetensors\n"), ended.err
    assert ended.err.splitlines()[-1] == (
        f"to paint with it: gouache paint 'zorb, number 0' -m {model} --lora pics.safetensors"
    )
    lines = [line for line in ended.err.splitlines() if line.startswith("step ")]
    assert len(lines) == 1 and lines[0].startswith("step 2/2  loss ") and "rate" in lines[0] and "left" in lines[0]
    assert (tmp_path / "runs/pics/samples/sheet.png").exists()

    again = gouache("train", "lora", "pics", "-m", model, "--steps", 2, *SHORT)
    assert again.code == 2 and again.err.count("\n") == 1
    assert "go on with it: gouache train run runs/pics" in again.err

    finished = gouache("train", "run", "runs/pics")
    assert finished.code == 0 and "all 2 steps are done; to train more" in finished.err
    more = gouache("train", "run", "runs/pics/settings.toml", "--set", "train.steps=3")
    assert more.code == 0 and "goes on after step 2 of 3" in more.err

    human = gouache("train", "status", "runs/pics")
    assert human.out.splitlines()[0] == "lora, finished: step 3 of 3 (100%)"
    assert "changed  step 2: settings.steps 2 -> 3" in human.out
    values = json.loads(gouache("train", "status", "runs/pics", "--json").out)
    assert (values["state"], values["step"], values["saved"][-1]) == ("finished", 3, 3)

    for command in (["report", "runs/pics", "-o", "a.html"], ["compare", "runs/pics@2", "runs/pics", "-o", "b.html"]):
        made = gouache("train", *command)
        assert (made.code, made.out) == (0, f"{command[-1]}\n"), made.err
        assert (tmp_path / command[-1]).read_text().startswith("<!doctype html>")
    exported = gouache("train", "export", "runs/pics", "x.safetensors", "--step", "2", "--names", "diffusers")
    assert (exported.code, exported.out, exported.err) == (0, "x.safetensors\n", "weights of step 2\n")
    refused = gouache("train", "export", "runs/pics", "x.safetensors")
    assert refused.code == 2 and "already exists" in refused.err and refused.err.count("\n") == 1
    painted = gouache("paint", "zorb", "-m", model, "--lora", "runs/pics", "--steps", 1, "--size", "64x64")
    assert painted.code == 0 and "pics-step-00000003" in painted.err


def test_new_writes_a_commented_file_that_run_takes_as_it_is(gouache: Command, data: Path, model: Path, tmp_path: Path):
    ended = gouache("train", "new", "lora", "pics", "-m", model, "-o", "my.toml", "--steps", 1, *SHORT)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "my.toml is written; start the run with: gouache train run my.toml\n"
    text = (tmp_path / "my.toml").read_text()
    for table, keys in tomllib.loads(text).items():
        for key in keys if isinstance(keys, dict) else [table]:
            before, _, _ = text.partition(f"\n{key} = ")
            assert before.splitlines()[-1].startswith("# "), f"{table}.{key} has no comment"
    assert run_settings.read(tmp_path / "my.toml").train.steps == 1

    assert "already exists" in gouache("train", "new", "lora", "pics", "-m", model, "-o", "my.toml").err
    started = gouache("train", "run", "my.toml")
    assert (started.code, started.out) == (0, "my.safetensors\n"), started.err
    assert (tmp_path / "runs/my/settings.toml").exists()
    # The run's own file has absolute paths: it can be gone on with from anywhere.
    assert run_settings.read(tmp_path / "runs/my/settings.toml").data.folder == str(tmp_path / "pics")


NEW = {
    "lora": ["pics"],
    "dreambooth": ["pics", "--trigger", "zorb"],
    "finetune": ["pics"],
    "embedding": ["pics", "--trigger", "zorb", "--init-word", "a cat", "--vectors", 2],
    "hypernetwork": ["pics"],
    "slider": ["--target", "a cat", "--positive", "a red cat", "--opposite", "a blue cat"],
    "pretrain": ["pics", "--part", "unet"],
}


@pytest.mark.parametrize("mode", run_settings.MODES)
def test_new_writes_a_file_that_can_be_run_in_every_mode(
    mode: str, gouache: Command, data: Path, model: Path, settings: Settings, tmp_path: Path
):
    (tmp_path / "my").mkdir()
    ended = gouache("train", "new", mode, *NEW[mode], "-m", model, "-o", "my/own.toml", "--set", "probe=1")
    assert ended.code == 0, ended.err
    written = run_settings.read(tmp_path / "my/own.toml")
    name = {"embedding": "zorb.safetensors", "hypernetwork": "own.pt"}.get(mode, "own.safetensors")
    assert written.output == f"my/{name}"
    assert mode != "embedding" or (written.embedding.vectors, written.embedding.init_word) == (2, "a cat")
    chosen, folder = opening.opened(Path("my/own.toml"), [])  # what a run refuses before it reads a weight
    assert folder.path == Path("runs/own")
    opening.check_output(chosen, folder, overwrite=False)
    prepare.check_model(chosen, settings)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("dreambooth", ["--trigger", "zorb", "--class", "a cat", "--set", "class_pictures=1"]),
        ("finetune", ["-o", "tuned.safetensors"]),
    ],
)
def test_other_modes_are_one_command_too(
    mode: str, options: list[str], gouache: Command, data: Path, model: Path, tmp_path: Path
):
    short = SHORT if mode == "dreambooth" else [*SHORT[:4], *SHORT[6:]]  # trained weights have no rank
    ended = gouache("train", mode, "pics", "-m", model, "--steps", 1, *short, *options)
    assert ended.code == 0, ended.err
    assert (tmp_path / ended.out.strip()).exists()


def test_progress_does_not_flood_a_log(capsys: pytest.CaptureFixture[str]):
    with TrainingProgress() as progress:
        for step in range(1, 1001):
            progress.work("encoding", step, 1000)
            progress.show(Progress(step, 1000, {"loss": 0.5}, 1.0, (1000 - step) * 0.5, 1e-4, 1.0))
        progress.note("something to know")
    assert capsys.readouterr().err.splitlines() == [
        "step 1000/1000  loss 0.5000  rate 1.00e-04  0 s left", "note: something to know",
    ]  # fmt: skip


def test_progress_on_a_terminal_is_one_line_with_notes_above(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with TrainingProgress() as progress:
        progress.show(Progress(3, 1000, {"loss": 0.25}, 1.0, 500.0, 1e-4, 1.0))
        progress.note("a \x1b[31mnote")
    printed = capsys.readouterr().err
    assert "3/1000" in printed and "loss 0.2500" in printed and "note: a \\x1b[31mnote" in printed


@pytest.mark.skipif("sys.platform == 'win32'", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_a_signal_stops_a_run_in_one_line_that_says_how_to_go_on(
    number: int, code: int, gouache: Command, data: Path, model: Path, tmp_path: Path
):
    log = tmp_path / "runs/pics/log.jsonl"
    stopper = after(log.exists, lambda: os.kill(os.getpid(), number))
    ended = gouache("train", "lora", "pics", "-m", model, "--steps", 5000, *SHORT)
    stopper.join()
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "runs/pics").glob("step-*"))
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.splitlines()[-1] == (
        f"stopped at step {steps[-1]} of 5000, which is saved; to go on: gouache train run runs/pics"
    )
    assert gouache("train", "status", "runs/pics").out.startswith("lora, stopped: step ")


@pytest.mark.skipif("sys.platform == 'win32'", reason="no flock")
def test_a_second_run_in_the_folder_is_refused_in_one_line(gouache: Command, data: Path, model: Path, tmp_path: Path):
    gouache("train", "new", "lora", "pics", "-m", model, "-o", "pics.toml", *SHORT)
    with state.locked(tmp_path / "runs/pics"):
        ended = gouache("train", "run", "pics.toml", "--set", "train.steps=7")
    assert ended.code == 2 and "another run is training here" in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "runs/pics/settings.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "nothing"], "nothing: does not exist"),
        (["lora", "pics", "-o", "there.safetensors"], "already exists"),
        (["lora", "pics", "-o", "picture.png"], "does not end in .safetensors"),
        (["lora", "pics", "-o", "no/folder/x.safetensors"], "its folder does not exist"),
        (["lora", "pics", "--set", "rnak=3"], "rnak is not a setting"),
        (["lora", "pics", "--set", "rank"], "is not key=value"),
        (["lora", "pics", "--set", "tensorboard=perhaps"], "tensorboard"),
        (["dreambooth", "pics"], "--trigger zorb"),
        (["new", "paint", "pics", "-o", "x.toml"], "use lora, dreambooth, finetune"),
        (["new", "lora", "pics", "-o", "x.safetensors"], "does not end in .toml"),
        (["hypernetwork", "pics", "-o", "no/such/h.pt"], "its folder does not exist"),
        (["lora", "pics", "-o", "no/such/x.safetensors", "--dry-run"], "its folder does not exist"),
        (["hypernetwork", "pics", "-o", "h.safetensors", "--dry-run"], "does not end in .pt"),
        (["new", "pretrain", "pics", "-o", "x.toml"], "pretrain.part: is missing; expected vae, text, unet"),
        (["new", "lora", "-o", "x.toml"], "data.folder: is missing"),
        (["run", "nothing.toml"], "does not exist"),
        (["run", "pics"], "is not the folder of a training run"),
        (["status", "pics"], "is not the folder of a training run"),
        (["status", "nothing"], "does not exist"),
        (["compare", "pics"], "at least two"),
        (["report", "pics", "-o", "there.safetensors"], "does not end in .html"),
        (["export", "pics", "x.safetensors"], "is not the folder of a training run"),
    ],
)
def test_what_cannot_work_is_one_line(
    arguments: list[str], message: str, gouache: Command, data: Path, model: Path, tmp_path: Path
):
    (tmp_path / "there.safetensors").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with_model = arguments[0] in ("lora", "dreambooth", "finetune", "hypernetwork", "new")
    ended = gouache("train", *arguments, *(["-m", model] if with_model else []))
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1 and ended.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_python_does_the_same_and_reports_through_callbacks(
    data: Path, model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    work: list[tuple[str, int, int]] = []
    notes: list[str] = []
    options: dict[str, Any] = dict(  # noqa: C408
        model=model, output="out.safetensors", folder="run", trigger="zorb", steps=3, settings=settings,
        on_progress=lambda progress: steps.append(progress.step), on_work=lambda *each: work.append(each),
        on_note=notes.append, rank=2, samples={"every": 1000, "steps": 1}, resolution=[64], workers=0,
    )  # fmt: skip
    stopped = package.train("lora", data, **options, should_stop=lambda: len(steps) == 2)
    assert (stopped.path, stopped.step, stopped.steps, stopped.signal) == (None, 2, 3, 0)
    finished = package.train("lora", data, **options)
    assert (finished.path, finished.step) == (Path("out.safetensors"), 3)
    assert steps == [1, 2, 3] and any("encoding" in what for what, *_ in work)
    assert "goes on after step 2 of 3" in notes
    again = package.train("lora", str(data), **{**options, "cache_folder": tmp_path / "cache"}, train={"patience": 0})
    assert again.step == 3 and RunFolder(tmp_path / "run").settings().data.cache_folder == str(tmp_path / "cache")
    with pytest.raises(RequestError, match=r"^data: is other, but the run in run has begun with"):
        package.train("lora", "other", **options)
    (tmp_path / "other.safetensors").write_bytes(model.read_bytes())
    with pytest.raises(RequestError, match=r"^model: is other\.safetensors, but the run in run has begun with"):
        package.train("lora", data, **{**options, "model": Path("other.safetensors")})
    with pytest.raises(RequestError, match="out"):
        package.train("lora", data, **{**options, "folder": "other"})
