"""The loop on a linear regression: rates, averages, logs, validation, previews, stopping, and runs that fail."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from gouache.errors import TrainingError
from gouache.training import state
from gouache.training.loop import train
from gouache.training.objective import Group, by_decay, step_generator

from .toys import Regression, points, regression, settings


def log_of(folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_regression_finds_the_line_that_its_data_comes_from(tmp_path):
    objective = regression()
    truth = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.3, 3.0]])

    def batch(number: int):
        x = torch.randn(16, 3, generator=step_generator(0, number))
        return x, x @ truth.T + 0.25

    result = train(objective, batch, settings(steps=500, learning_rate=0.05, weight_decay=0.0), tmp_path)

    assert result.finished and result.step == 500
    torch.testing.assert_close(result.last["net.weight"], truth, atol=0.02, rtol=0)
    torch.testing.assert_close(result.last["net.bias"], torch.tensor([0.25, 0.25]), atol=0.02, rtol=0)


def test_steps_are_those_of_a_plain_loop_with_torchs_adamw(tmp_path):
    given = settings(steps=7, learning_rate=0.02, warmup=3, weight_decay=0.1, clip_norm=0.5, schedule="cosine")
    net = regression().net
    optimizer = torch.optim.AdamW(
        [{"params": [net.weight], "weight_decay": 0.1}, {"params": [net.bias], "weight_decay": 0.0}],
        betas=(0.9, 0.99),
    )
    for step in range(7):
        x, y = points(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = given.rate(step)
        optimizer.step()

    result = train(regression(), points, given, tmp_path)

    torch.testing.assert_close(result.last["net.weight"], net.weight.detach())
    torch.testing.assert_close(result.last["net.bias"], net.bias.detach())


def test_a_group_is_trained_at_its_own_multiple_of_the_rate(tmp_path):
    # Adam's first step has the size of the learning rate, for any size of the gradient.
    objective = regression()
    start = {name: value.clone() for name, value in objective.net.state_dict().items()}
    groups = (
        Group({"net.weight": objective.net.weight}, rate=0.1, decay=False),
        Group({"net.bias": objective.net.bias}, decay=False),
    )

    train(Regression(objective.net, groups), points, settings(steps=1, learning_rate=0.01), tmp_path)

    moved = {name: (value - start[name]).abs() for name, value in objective.net.state_dict().items()}
    torch.testing.assert_close(moved["weight"], torch.full((2, 3), 0.001), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moved["bias"], torch.full((2,), 0.01), rtol=1e-3, atol=1e-7)


def test_matrices_have_weight_decay_and_vectors_do_not():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    network[2].bias.requires_grad_(False)

    matrices, vectors = by_decay({"n": network})

    assert matrices.decay and set(matrices.parameters) == {"n.0.weight", "n.2.weight"}
    assert not vectors.decay and set(vectors.parameters) == {"n.0.bias", "n.1.weight", "n.1.bias"}


def test_a_step_with_accumulated_batches_equals_one_with_their_union(tmp_path):
    def halves(number: int):
        x, y = points(number // 2)
        return (x[:2], y[:2]) if number % 2 == 0 else (x[2:], y[2:])

    split = train(regression(), halves, settings(accumulate=2, log_steps=1), tmp_path / "split")
    whole = train(regression(), points, settings(log_steps=1), tmp_path / "whole")

    torch.testing.assert_close(split.last, whole.last)
    for name in ("loss", "norm"):  # Adam hides the scale of a gradient, its norm does not
        split_log, whole_log = ([line[name] for line in log_of(tmp_path / run)] for run in ("split", "whole"))
        assert split_log == pytest.approx(whole_log, rel=1e-4)


def test_validation_has_the_averaged_weights_and_the_last_ones_are_restored(tmp_path):
    objective = regression()
    seen = []

    def validate():
        seen.append(objective.net.weight.detach().clone())
        return {"loss": 0.0}

    result = train(
        objective, points, settings(steps=3, ema_decay=0.5, validate_steps=3, learning_rate=0.3), tmp_path,
        validate=validate,
    )  # fmt: skip

    average, last = seen
    stored = state.newest(tmp_path)
    assert stored is not None
    assert torch.equal(average, stored.tensors["ema"]["net.weight"])
    assert torch.equal(last, objective.net.weight)
    assert torch.equal(result.weights["net.weight"], average)
    assert torch.equal(result.last["net.weight"], objective.net.weight)
    assert torch.equal(stored.tensors["weights"]["net.weight"], objective.net.weight)
    assert not torch.allclose(average, objective.net.weight, atol=0.01)


def test_the_last_weights_are_restored_even_if_validation_fails(tmp_path):
    objective = regression()
    before = []

    def validate():
        before.append(objective.net.weight.detach().clone())
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        train(
            objective, points, settings(ema_decay=0.5, validate_steps=2, learning_rate=0.3), tmp_path, validate=validate
        )

    assert not torch.equal(before[0], objective.net.weight)


def test_without_averages_the_result_has_the_last_weights(tmp_path):
    result = train(regression(), points, settings(ema_decay=0), tmp_path)

    stored = state.newest(tmp_path)
    assert stored is not None and stored.tensors.keys() == {"weights", "optimizer"}
    assert torch.equal(result.weights["net.weight"], result.last["net.weight"])


def scored(*losses: float, **others: float):
    """A validation with these losses in turn, the same for averaged and last weights."""
    left = iter([loss for loss in losses for _ in range(2)])
    return lambda: {"loss": next(left), **others}


def test_validation_is_logged_for_averaged_and_last_weights(tmp_path):
    objective = regression()

    def validate():
        return {"loss": objective.net.weight.abs().sum().item(), "psnr": 1.0}

    result = train(objective, points, settings(steps=4, validate_steps=2, ema_decay=0.5), tmp_path, validate=validate)

    lines = [line for line in log_of(tmp_path) if "validation psnr" in line]
    assert [line["step"] for line in lines] == [2, 4] and [line["validation raw psnr"] for line in lines] == [1.0] * 2
    assert lines[-1]["validation loss"] == pytest.approx(result.weights["net.weight"].abs().sum().item(), rel=1e-5)
    assert lines[-1]["validation raw loss"] == pytest.approx(result.last["net.weight"].abs().sum().item(), rel=1e-5)


def test_without_averages_validation_is_done_once(tmp_path):
    validate = scored(1.0, 2.0)

    train(regression(), points, settings(steps=4, validate_steps=1, ema_decay=0), tmp_path, validate=validate)

    assert [line["validation loss"] for line in log_of(tmp_path) if "validation loss" in line] == [1.0, 1.0, 2.0, 2.0]
    assert not any("validation raw loss" in line for line in log_of(tmp_path))


def test_the_log_has_rate_loss_and_norm_even_if_they_are_tiny(tmp_path):
    reports = []

    train(regression(), points, settings(steps=5, learning_rate=3e-9, log_steps=2), tmp_path, on_log=reports.append)

    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(line["rate"] == pytest.approx(3e-9) for line in lines)
    assert all(line["norm"] > 0 for line in lines)
    assert [progress.step for progress in reports] == [2, 4, 5]
    assert [progress.losses["loss"] for progress in reports] == pytest.approx(
        [line["loss"] for line in lines], rel=1e-5
    )
    assert reports[-1].left == 0
    assert [progress.norm for progress in reports] == pytest.approx([line["norm"] for line in lines], rel=1e-5)
    assert {progress.rate for progress in reports} == {3e-9}


def test_a_run_out_of_time_stops_and_a_finished_run_does_nothing(tmp_path):
    stopped = train(regression(), points, settings(), tmp_path, seconds=0)
    assert (stopped.step, stopped.finished, state.newest(tmp_path)) == (0, False, None)

    done = train(regression(), points, settings(), tmp_path)
    again = train(regression(), lambda number: pytest.fail("a batch was requested"), settings(), tmp_path)

    assert done.finished and again.finished and again.step == 6
    torch.testing.assert_close(again.last, done.last, rtol=0, atol=0)


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_damaged_newest_checkpoint_is_reported(tmp_path, capsys, with_callback):
    train(regression(), points, settings(steps=4, save_seconds=1e-9), tmp_path)
    (tmp_path / "step-00000004" / "weights.safetensors").write_bytes(b"")

    notes: list[str] = []
    done = train(regression(), points, settings(), tmp_path, on_note=notes.append if with_callback else None)

    printed = capsys.readouterr().err
    assert done.finished and (tmp_path / "step-00000004.bad").is_dir()
    (line,) = notes if with_callback else printed.splitlines()
    assert "step-00000004 is damaged (" in line and line.endswith("the run goes on from step 3")
    assert (printed == "") == with_callback


@pytest.mark.parametrize("key", ["best", "settings", "ema_updates"])
def test_a_checkpoint_whose_state_lacks_a_value_is_passed_over(tmp_path, key):
    from .test_checkpoints import seal

    train(regression(), points, settings(steps=4, save_seconds=1e-9), tmp_path)
    path = tmp_path / "step-00000004" / "state.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    seal(path.parent)

    notes: list[str] = []
    assert train(regression(), points, settings(), tmp_path, on_note=notes.append).finished
    assert len(notes) == 1 and f"state.json has no valid '{key}'" in notes[0]


def test_a_checkpoint_without_the_optimizer_is_passed_over(tmp_path):
    train(regression(), points, settings(steps=4, save_seconds=1e-9), tmp_path)
    path = tmp_path / "step-00000004" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))

    notes: list[str] = []
    assert train(regression(), points, settings(), tmp_path, on_note=notes.append).finished
    assert len(notes) == 1 and "optimizer.safetensors is missing" in notes[0]


def test_a_run_whose_checkpoints_are_gone_says_so(tmp_path):
    train(regression(), points, settings(), tmp_path)
    for path in state.checkpoints(tmp_path):
        path.rename(path.with_name(f"{path.name}.bad"))

    notes: list[str] = []
    train(regression(9), points, settings(), tmp_path, on_note=notes.append)

    (note,) = notes
    assert "has no checkpoint, but log.jsonl, step-00000006.bad of an earlier run" in note
    assert note.endswith("starts from step 0")


def test_a_first_run_has_no_notes(tmp_path, capsys):
    train(regression(), points, settings(), tmp_path)
    train(regression(), points, settings(), tmp_path)

    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_log_on_a_full_disk_is_one_error_and_the_checkpoints_remain(tmp_path):
    import resource
    import signal

    train(regression(), points, settings(steps=2), tmp_path)
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text().ljust(4000))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(number: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        return points(number)

    try:
        with pytest.raises(
            TrainingError, match=r"log.jsonl: cannot be written: .*; the checkpoints are kept"
        ) as caught:
            train(regression(), limited, settings(log_steps=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert "\n" not in str(caught.value)
    found = state.newest(tmp_path)
    assert found is not None and found.step == 2


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"5"])
def test_damaged_lines_of_the_log_are_removed(tmp_path, text):
    train(regression(), points, settings(steps=2, log_steps=1), tmp_path)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(text + b"\n")

    train(regression(), points, settings(steps=3, log_steps=1), tmp_path)

    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]


def test_a_run_outside_the_main_thread_works_without_signals(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, regression(), points, settings(), tmp_path).result()

    assert result.finished


def test_should_stop_ends_a_run_in_another_thread_which_saves_and_can_resume(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    stop, calls = Event(), []

    def batches(number: int):
        calls.append(number)
        if number == 2:
            stop.set()  # during the third step: it is finished
        return points(number)

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, regression(), batches, settings(), tmp_path, should_stop=stop.is_set)
        stopped = run.result()

    assert (stopped.step, stopped.finished, calls) == (3, False, [0, 1, 2])
    found = state.newest(tmp_path)
    assert found is not None and found.step == 3
    whole = train(regression(), points, settings(), tmp_path / "whole")
    resumed = train(regression(seed=9), points, settings(), tmp_path)
    torch.testing.assert_close(dict(resumed.last), dict(whole.last), rtol=0, atol=0)


def test_validation_and_previews_are_made_without_dropout_and_training_goes_on_with_it(tmp_path):
    dropout = nn.Dropout(0.5)
    objective = Regression(nn.Sequential(nn.Linear(3, 2), dropout))
    seen: list[bool] = []

    def look(*_: int):
        seen.append(dropout.training)
        return {"loss": 0.0}

    train(
        objective, points, settings(steps=2, validate_steps=1), tmp_path,
        validate=look, on_preview=look, preview_steps=range(9),
    )  # fmt: skip

    assert seen == [False] * 7 and dropout.training


def test_previews_are_made_at_the_chosen_steps_with_the_averaged_weights(tmp_path):
    objective = regression()
    seen = {}

    def preview(step: int) -> None:
        seen[step] = objective.net.weight.detach().clone()

    chosen = {"on_preview": preview, "preview_steps": {0, 2, 3}}
    first = train(objective, points, settings(steps=2, ema_decay=0.5, learning_rate=0.3), tmp_path, **chosen)
    second = train(objective, points, settings(steps=4, ema_decay=0.5, learning_rate=0.3), tmp_path, **chosen)

    assert list(seen) == [0, 2, 3]
    assert torch.equal(seen[0], regression().net.weight)
    assert torch.equal(seen[2], first.weights["net.weight"])
    assert not torch.equal(seen[2], first.last["net.weight"])
    assert torch.equal(objective.net.weight, second.last["net.weight"])


def test_a_preview_that_fails_leaves_the_last_weights_in_place_and_an_interval_is_a_range(tmp_path):
    objective = regression()
    steps = []

    def preview(step: int) -> None:
        steps.append(step)
        if step == 6:
            raise RuntimeError("no image")

    with pytest.raises(RuntimeError, match="no image"):
        train(
            objective, points, settings(ema_decay=0.5, learning_rate=0.3), tmp_path,
            on_preview=preview, preview_steps=range(2, 1000, 2),
        )  # fmt: skip

    assert steps == [2, 4, 6]
    whole = train(regression(), points, settings(ema_decay=0.5, learning_rate=0.3), tmp_path / "whole")
    assert torch.equal(objective.net.weight, whole.last["net.weight"])


def test_parameters_outside_the_networks_are_trained_and_saved_under_their_own_names(tmp_path):
    objective = regression()
    objective.net.requires_grad_(False)
    factors = nn.Parameter(torch.zeros(2, 3))
    objective.net.register_forward_hook(lambda _, inputs, output: output + nn.functional.linear(inputs[0], factors))
    adapted = Regression(objective.net, (Group({"lora.net": factors}),))

    result = train(adapted, points, settings(), tmp_path)

    assert torch.equal(result.last["lora.net"], factors) and factors.abs().min() > 0
    assert torch.equal(objective.net.weight, regression().net.weight)
    stored = state.newest(tmp_path)
    assert stored is not None and set(stored.tensors["ema"]) == {"lora.net"}


def test_without_trainable_parameters_or_with_one_name_for_two_a_run_is_refused(tmp_path):
    objective = regression()
    twice = (Group({"w": objective.net.weight}), Group({"w": objective.net.bias}))
    with pytest.raises(TrainingError, match="same name"):
        train(Regression(objective.net, twice), points, settings(), tmp_path)

    objective.net.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        train(objective, points, settings(), tmp_path)


def test_the_generator_of_a_step_is_reproducible_and_differs_from_all_others():
    draws = {
        (seed, step): tuple(torch.randn(3, generator=step_generator(seed, step)).tolist())
        for seed in range(5)
        for step in range(-1, 200)
    }

    assert len(set(draws.values())) == len(draws)
    assert draws[2, 7] == tuple(torch.randn(3, generator=step_generator(2, 7)).tolist())
    first = torch.tensor([draw[0] for draw in draws.values()])
    assert abs(float(first.mean())) < 0.15 and abs(float(first.std()) - 1) < 0.1
