"""`gouache train run` in several processes: one result, written once, equal to that of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import gouache
from gouache.app.settings import Settings
from gouache.app.training.batch_changes import batch_changes, changed_processes
from gouache.app.training.folder import RunFolder
from gouache.files.open import open_model
from gouache.files.write import write_atomic
from gouache.training import state
from gouache.training.run_settings import RunSettings, checked, template
from gouache.training.state import State, save
from tests.app.training.short_runs import make_pictures, run, settings_of
from tests.pipelines import Narrow
from tests.training.processes import in_processes

Narrows = Callable[[str], Narrow]

# Some gradients of narrow models are mostly rounding (of biases before a norm): Adam would divide them by their own
# size. In float64 the parts of a batch give the gradient of the whole to 1e-13.
TRAIN = {"steps": 4, "learning_rate": 3e-4, "ema_decay": 0.9, "save_steps": 2, "optimizer_arguments": {"eps": 1e-2}}


def of_two(settings: RunSettings) -> RunSettings:
    """Half of the batch per process."""
    train = settings.train
    return settings.model_copy(update={"train": train.model_copy(update={"batch": train.batch // 2})})


def chosen(model: Path, pictures: Path, output: Path, **tables: Any) -> RunSettings:
    train = {**TRAIN, "batch": 4, **tables.pop("train", {})}
    data = {"caption_dropout": 0.3, "repeats": 3, **tables.pop("data", {})}
    return settings_of(model, pictures, output, train=train, data=data, **tables)


def go(world: Any, folder: Path, settings: list[str], user: Settings) -> None:
    """The runs of some settings (as TOML), each in a folder named like its output; `notes` has what each reported."""
    from gouache.outside import parse_toml

    for text in settings:
        values = checked(parse_toml(text))
        notes: list[str] = []
        path = folder / Path(values.output).stem
        finished = run_connected(world, values, path, user, notes)
        assert finished.rank == world.rank
        (folder / f"{path.name} {world.rank}.json").write_text(json.dumps(notes))


def run_connected(world: Any, settings: RunSettings, folder: Path, user: Settings, notes: list[str]) -> Any:
    """`runs.run` in processes that are connected already."""
    from contextlib import nullcontext

    from gouache.app.training import runs

    before, runs.processes = runs.processes, lambda device: nullcontext(world)
    try:
        finished = run(settings, folder, user, notes=notes)
        world.barrier()
        return finished
    finally:
        runs.processes = before


MODES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 2, "alpha": 2}},
    "weights": {
        "mode": "finetune", "adapter": {"form": "none"}, "parts": {"text_encoder": True},
        "samples": {"prompts": ["zorb"], "every": 2},
    },
    "shards": {
        "mode": "finetune", "adapter": {"form": "none"}, "parts": {"text_encoder": True},
        "samples": {"prompts": ["zorb"], "every": 2}, "memory": {"shard": True, "checkpointing": True},
    },
    "embedding": {"mode": "embedding", "embedding": {"vectors": 2}, "data": {"trigger": "zorb"}},
    "hypernetwork": {"mode": "hypernetwork"},
    "pivotal": {"embedding": {"vectors": 2, "rate": 10.0}, "data": {"trigger": "zorb"}, "adapter": {"rank": 2}},
}  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(each, marks=pytest.mark.full) for each in MODES])
def results(
    request: pytest.FixtureRequest, narrow: Narrows, tmp_path_factory: pytest.TempPathFactory, settings: Settings
) -> tuple[Path, Path]:
    """(folder of a run of one process, folder of the same in two); each run is `run` in it, its result `run.*`."""
    name = "run.pt" if request.param == "hypernetwork" else "run.safetensors"
    folder = tmp_path_factory.mktemp("torchrun")
    pictures = make_pictures(folder / "pictures", ((64, 64), (96, 64), (64, 96), (64, 64), (80, 64)))
    (pictures / "0.txt").write_text("zorb, " + "a long caption, " * 30)  # two chunks
    one, two = folder / "one", folder / "two"
    two.mkdir()
    values = [chosen(narrow("sd1").file, pictures, where / name, **MODES[request.param])
              for where in (one, two)]  # fmt: skip
    one.mkdir()
    run(values[0], one / "run", settings)
    codes = in_processes(go, two, [template(of_two(values[1]))], settings)
    assert codes == [0, 0], (two / "errors").read_text()
    return one, two


def test_two_processes_write_what_one_does(results: tuple[Path, Path]):
    assert all(list(folder.glob("run.*")) for folder in results)
    files = [state.read(folder / "run" / "step-00000004").tensors["weights"] for folder in results]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor, rtol=0, atol=1e-6)


def test_two_processes_train_one_run(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    """The short form of the tests with `results`: it ends, trained on both halves of the batch, and reported once."""
    values = chosen(
        narrow("sd1").file, pictures, tmp_path / "run.safetensors", adapter={"rank": 2, "alpha": 2},
        train={"steps": 2, "save_steps": 0, "validate_steps": 1000},
    )  # fmt: skip
    codes = in_processes(go, tmp_path, [template(of_two(values))], settings)
    assert codes == [0, 0], (tmp_path / "errors").read_text()
    assert json.loads((tmp_path / "run 1.json").read_text()) == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    folder, result = RunFolder(tmp_path / "run"), open_model(tmp_path / "run.safetensors")
    assert (folder.steps(), folder.state()["processes"]) == ([2], 2)
    assert result.metadata["ss_total_batch_size"] == "4"  # of 2 per process
    assert any(result.tensor(name).any() for name in result if name.endswith("lora_up.weight"))  # which began as 0


def test_only_the_first_process_writes_and_reports(results: tuple[Path, Path]):
    one, two = (
        sorted(
            str(path.relative_to(folder))
            for path in (folder / "run").rglob("*")
            if path.parent.name not in ("texts", "tensorboard")  # names depend on the processes, and times
            and not path.relative_to(folder / "run")
            .parts[0]
            .startswith("step-")  # each process writes its part of shards
        )
        for folder in results
    )
    assert one == two and "run/log.jsonl" in one
    assert json.loads((results[1] / "run 1.json").read_text()) == []
    assert not (results[1] / "errors").read_text()
    lines = [json.loads(line) for line in (results[1] / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_the_samples_show_the_same(results: tuple[Path, Path]):
    one, two = (sorted((folder / "run" / "samples").glob("step*.png")) for folder in results)
    assert [path.name for path in one] == [path.name for path in two]
    for paths in zip(one, two):
        first, second = (Image.open(path).convert("RGB") for path in paths)
        assert np.asarray(ImageChops.difference(first, second)).max() <= 2


def written(folder: Path, batch: int, **values: Any) -> RunFolder:
    tensors = {"weights": {"a": torch.zeros(1)}, "optimizer": {"a.step": torch.zeros(1)}}
    usual = {"step": 5, "number": 5, "best": None, "ema_updates": 0, "settings": {"batch": batch}}
    save(folder, State(tensors, {**usual, **values}), keep=9)
    return RunFolder(folder)


def test_the_batch_of_all_processes_decides_the_order_of_the_pictures(tmp_path: Path):
    """2 x 4, from step 3 on 4 x 4, from step 5 on 4 x 2: the whole batches have 8, 16 and 8 pictures."""
    changes = [
        {"step": 3, "name": "run.processes", "before": 2, "after": 4},
        {"step": 5, "name": "settings.batch", "before": 4, "after": 2},
    ]
    folder = written(tmp_path, 2, processes=4, changes=changes)
    settings = checked({"train": {"steps": 9, "batch": 2, "learning_rate": 1e-4}})
    assert batch_changes(folder, settings, 4) == (8, ((3, 16), (5, 8)))
    assert batch_changes(folder, settings, 1) == (8, ((3, 16), (5, 2)))
    assert changed_processes(folder, settings, 4) == ""
    assert changed_processes(folder, settings, 1) == (
        "4 processes trained with batches of 8 pictures, 1 will with 2; to keep 8: --set train.batch=8"
    )


def test_an_equal_whole_batch_in_another_number_of_processes_is_no_change(tmp_path: Path):
    folder = written(tmp_path, 2, processes=2)
    settings = checked({"train": {"steps": 9, "batch": 4, "learning_rate": 1e-4}})
    assert batch_changes(folder, settings, 1) == (4, ())


@pytest.fixture
def torchrun(narrow: Narrows, pictures: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `torchrun ... gouache train run` on a small LoRA."""

    def start(processes: int, *arguments: str, **train: Any) -> subprocess.Popen[str]:
        settings = chosen(narrow("sd1").file, pictures, tmp_path / "out.safetensors",
                          adapter={"rank": 2, "alpha": 2}, train=train)  # fmt: skip
        file = tmp_path / "small.toml"
        write_atomic(file, template(settings).encode())
        environment = {
            **os.environ, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(gouache.__file__).parents[1]),
        }  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.Popen(
            [*command, "-m", "gouache", "train", "run", "small.toml", *arguments],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.mark.full
def test_torchrun_trains_prints_once_and_a_stopped_run_goes_on_in_one_process(torchrun: Any, tmp_path: Path):
    """Ctrl-C, as torchrun passes it on: a checkpoint; then the rest with one process and twice the batch."""
    running = torchrun(2, batch=2, steps=100_000, log_steps=1)
    log = tmp_path / "runs" / "small" / "log.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert error.count("stopped at step") == 1, error
    folder = RunFolder(tmp_path / "runs" / "small")
    step = folder.steps()[-1]

    again = torchrun(1, f"--set=train.steps={step + 2}", "--set=train.batch=4", batch=2)
    out, error = again.communicate(timeout=180)
    assert again.returncode == 0, error
    assert out.strip() == "out.safetensors" or out.strip().endswith("out.safetensors")
    assert (tmp_path / "out.safetensors").exists()
    assert [each["name"] for each in folder.state()["changes"] if "processes" in each["name"]] == ["run.processes"]


@pytest.mark.full
def test_an_error_of_all_processes_is_printed_once(torchrun: Any):
    running = torchrun(2, "--set=model.name=nothing", batch=2)
    _, error = running.communicate(timeout=180)
    assert running.returncode == 1
    assert error.count("error: ") == 1, error
