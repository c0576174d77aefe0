"""Resuming within one process: every objective is bit-equal, and a run that does not fit is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.schedule import Schedule
from gouache.errors import TrainingError
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, UNetSpec, VisionSpec
from gouache.nn.unet import UNet
from gouache.training import state
from gouache.training.batch import Batch
from gouache.training.contrastive import Contrast, Pairs
from gouache.training.denoising import Denoising
from gouache.training.loop import train
from gouache.training.noise import NoiseOptions
from gouache.training.objective import Group, step_generator
from gouache.training.snapshot import begin, restore

from .toys import Regression, denoiser_factory, linear, pictures, points, regression, settings, small_autoencoder


def autoencoder():
    return small_autoencoder(), pictures


def contrastive():
    text = ClipText(TextSpec(width=16, layers=1, heads=2, mlp_width=16, vocabulary=10, positions=5, projection=8))
    vision = ClipVision(VisionSpec(width=16, layers=1, heads=2, mlp_width=16, image_size=8, patch_size=4, projection=8))

    def pairs(number: int) -> Pairs:
        generator = step_generator(2, number)
        return Pairs(torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 10, (4, 5), generator=generator))

    return Contrast(text, vision), pairs


def denoising():
    unet = UNet(UNetSpec(channels=32, channel_mult=(1,), res_blocks=1, attention_depth=(1,), heads=4, context_dim=8))
    unet = unet.to(memory_format=torch.channels_last)

    def captioned(number: int) -> Batch:
        generator = step_generator(3, number)
        conditioning = Conditioning(torch.randn(2, 3, 8, generator=generator))
        return Batch(torch.randn(2, 4, 4, 4, generator=generator), conditioning)

    factory = denoiser_factory(unet, Schedule.scaled_linear(), "v")
    return Denoising(factory, {"unet": unet}, Conditioning(torch.zeros(1, 3, 8)), seed=4), captioned


def fresh(make):
    """The objective as at the start of a process: the same weights each time, unlike those of a trained one."""
    objective, batches = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in objective.networks.values():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return objective, batches


def assert_bit_equal(one, other):
    found, expected = state.newest(one), state.newest(other)
    assert found is not None and expected is not None and found.step == expected.step
    assert found.tensors.keys() == expected.tensors.keys()
    for file, tensors in expected.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        unequal = [name for name, tensor in tensors.items() if not torch.equal(found.tensors[file][name], tensor)]
        assert not unequal


@pytest.mark.parametrize("make", [autoencoder, contrastive, denoising])
def test_a_run_resumed_twice_is_bit_equal_to_an_uninterrupted_one(tmp_path, make):
    given = {"accumulate": 2, "warmup": 2, "ema_decay": 0.9, "log_steps": 1}
    objective, batches = fresh(make)
    whole = train(objective, batches, settings(steps=6, **given), tmp_path / "whole")

    for steps in (2, 3, 6):
        objective, batches = fresh(make)
        parts = train(objective, batches, settings(steps=steps, **given), tmp_path / "parts")

    assert_bit_equal(tmp_path / "parts", tmp_path / "whole")
    torch.testing.assert_close(dict(parts.weights), dict(whole.weights), rtol=0, atol=0)
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_restored_optimizer_state_has_the_memory_format_of_its_parameter(tmp_path):
    objective, batches = fresh(autoencoder)
    train(objective, batches, settings(steps=2), tmp_path)
    stored = state.newest(tmp_path)
    assert stored is not None
    objective, _ = fresh(autoencoder)
    run = begin(objective, settings(steps=2))

    restore(run, stored, tmp_path)

    channels_last = [parameter for parameter in run.parameters.values() if not parameter.is_contiguous()]
    assert channels_last
    for parameter in channels_last:
        assert run.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_which_is_renamed(tmp_path):
    train(regression(), points, settings(steps=6), tmp_path / "whole")
    train(regression(), points, settings(steps=4, save_seconds=1e-9, log_steps=1), tmp_path / "parts")
    newest = tmp_path / "parts" / "step-00000004" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])

    train(regression(seed=9), points, settings(steps=6, log_steps=1), tmp_path / "parts")

    assert_bit_equal(tmp_path / "parts", tmp_path / "whole")
    assert (tmp_path / "parts" / "step-00000004.bad").is_dir()
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_never_silently_starts_over(tmp_path):
    train(regression(), points, settings(steps=3, save_seconds=1e-9), tmp_path)
    for path in state.checkpoints(tmp_path):
        (path / "manifest.json").unlink()

    for _ in range(2):
        with pytest.raises(TrainingError, match="damaged"):
            train(regression(), points, settings(steps=6), tmp_path)


def test_an_incomplete_log_line_of_a_killed_run_is_replaced(tmp_path):
    train(regression(), points, settings(steps=4, log_steps=1), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')

    train(regression(), points, settings(steps=6, log_steps=1), tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_format_1_which_numbered_the_parameters_resume(tmp_path):
    train(regression(), points, settings(steps=6), tmp_path / "whole")
    train(regression(), points, settings(steps=3), tmp_path / "parts")
    path = tmp_path / "parts" / "step-00000003"
    moments = load_file(path / "optimizer.safetensors")
    numbers = {"net.weight": "0", "net.bias": "1"}  # matrices, which have weight decay, precede vectors
    assert {name.rpartition(".")[0] for name in moments} == set(numbers)
    save_file(
        {f"{numbers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in moments.items()},
        path / "optimizer.safetensors",
    )
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "optimizer.safetensors").read_bytes()
    manifest["files"]["optimizer.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))

    train(regression(seed=9), points, settings(steps=6), tmp_path / "parts")

    assert_bit_equal(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "changed",
    [
        {"clip_norm": 0.001},
        {"betas": (0.5, 0.6)},
        {"weight_decay": 0.5},
        {"accumulate": 2},
        {"ema_decay": 0.1},
        {"learning_rate": 0.5},
        {"schedule": "linear"},
        {"steps": 7, "schedule": "cosine"},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_any_setting_may_change_and_acts_from_the_next_step_on(tmp_path, changed):
    """As if a run had changed it in place: the state of the optimizer, the batches and the averages go on."""
    unchanged = train(regression(), points, settings(steps=5), tmp_path / "unchanged")
    train(regression(), points, settings(steps=3), tmp_path / "changed")
    before = state.newest(tmp_path / "changed")
    seen: list[int] = []

    def batches(number: int):
        seen.append(number)
        return points(number)

    after = train(regression(9), batches, settings(**{"steps": 5, **changed}), tmp_path / "changed")

    assert seen[0] == 3  # no batch is left out or repeated, also if more of them make a step
    assert before is not None
    assert not torch.equal(after.weights["net.weight"], unchanged.weights["net.weight"])
    recorded = state.newest(tmp_path / "changed")
    assert recorded is not None
    assert {each["name"].split(".")[1] for each in recorded.values["changes"]} == {"steps", *changed}
    assert {each["step"] for each in recorded.values["changes"]} == {3}
    run = begin(regression(9), settings(**{"steps": 5, **changed}))
    restore(run, before, tmp_path)
    for name, tensor in before.tensors["optimizer"].items():
        parameter, _, key = name.rpartition(".")
        assert torch.equal(run.optimizer.state[run.parameters[parameter]][key], tensor)


def test_averages_begin_from_the_weights_when_they_are_switched_on(tmp_path):
    first = train(regression(), points, settings(steps=3, ema_decay=0), tmp_path)
    run = begin(regression(9), settings(steps=5, ema_decay=0.9))
    stored = state.newest(tmp_path)
    assert stored is not None

    restore(run, stored, tmp_path)

    assert run.ema is not None and run.ema.updates == 0
    torch.testing.assert_close(run.ema.weights, dict(first.last), rtol=0, atol=0)
    train(regression(9), points, settings(steps=5, ema_decay=0.9), tmp_path)
    train(regression(9), points, settings(steps=6, ema_decay=0), tmp_path)
    off = state.newest(tmp_path)
    assert off is not None and "ema" not in off.tensors


@pytest.mark.parametrize(
    "changed", [{"optimizer": "sgd"}, {"optimizer_arguments": {"amsgrad": True}}, {"optimizer": "muon"}]
)
def test_another_optimizer_starts_with_new_state_from_the_same_weights(tmp_path, changed):
    first = train(regression(), points, settings(steps=3), tmp_path / "run")
    fresh_start = regression(9)
    with torch.no_grad():
        for name, parameter in fresh_start.net.named_parameters():
            parameter.copy_(first.last[f"net.{name}"])
    expected = train(
        fresh_start, lambda number: points(number + 3), settings(steps=2, ema_decay=0, **changed), tmp_path / "fresh"
    )

    found = train(regression(9), points, settings(steps=5, **changed), tmp_path / "run")

    torch.testing.assert_close(dict(found.last), dict(expected.last), rtol=0, atol=0)


def test_a_setting_newer_than_the_checkpoint_had_its_default_and_a_removed_one_is_refused(tmp_path):
    train(regression(), points, settings(steps=2), tmp_path)
    rewrite(tmp_path, lambda values: values["settings"].pop("clip_norm"))

    assert train(regression(), points, settings(steps=3), tmp_path).step == 3

    rewrite(tmp_path, lambda values: values["settings"].update(dropout=0.3))
    with pytest.raises(TrainingError, match=r"settings.dropout 0\.3 \(now not set\)"):
        train(regression(), points, settings(steps=4), tmp_path)


def rewrite(folder, change, format=None):
    """Change the state.json of the newest checkpoint, and the manifest with it."""
    path = state.checkpoints(folder)[-1]
    values = json.loads((path / "state.json").read_text())
    change(values)
    data = json.dumps(values).encode()
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": format or manifest["format"]}))


def as_format_2(values):
    for name in ("objective", "changes", "optimizer"):
        del values[name]
    for name in ("optimizer", "optimizer_arguments"):
        del values["settings"][name]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Linear(3, 5), r"weights do not fit: net.bias is \[2\] in the checkpoint, \[5\] now"),
        (nn.Linear(3, 2, bias=False), r"weights do not fit: net.bias is \[2\] in the checkpoint, absent now"),
    ],
)
def test_a_run_with_other_networks_is_refused(tmp_path, net, words):
    train(regression(), points, settings(steps=2), tmp_path)

    with pytest.raises(TrainingError, match=words):
        train(Regression(net), points, settings(steps=4), tmp_path)


def test_a_run_with_other_trained_parameters_of_the_same_networks_is_refused(tmp_path):
    train(regression(), points, settings(steps=2, ema_decay=0), tmp_path / "plain")
    train(regression(), points, settings(steps=2), tmp_path / "averaged")
    net = regression().net
    only_bias = Regression(net, (Group({"net.bias": net.bias}),))

    with pytest.raises(TrainingError, match=r"net.weight was trained there and is not trained now"):
        train(only_bias, points, settings(steps=4, ema_decay=0), tmp_path / "plain")
    with pytest.raises(TrainingError, match=r"averages do not fit: net.weight"):
        train(only_bias, points, settings(steps=4), tmp_path / "averaged")


def partly_frozen(base=None):
    """(objective, its batch norm): a linear layer whose weight alone is trained, and a layer with buffers."""
    net = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3), linear=linear()))
    net.norm.requires_grad_(False)
    net.linear.bias.requires_grad_(False)
    return Regression(net, values={"base": base}), net.norm


def test_frozen_weights_are_not_saved_if_a_base_is_named_but_changed_buffers_are(tmp_path):
    objective, norm = partly_frozen(base="sha256 of the base model")

    result = train(objective, points, settings(steps=3), tmp_path / "parts")

    changed = {"net.norm.running_mean", "net.norm.running_var", "net.norm.num_batches_tracked"}
    assert set(result.last) == set(result.weights) == {"net.linear.weight", *changed}
    stored = state.newest(tmp_path / "parts")
    assert stored is not None and set(stored.tensors["weights"]) == set(result.last)
    objective, norm = partly_frozen(base="sha256 of the base model")
    train(objective, points, settings(), tmp_path / "parts")
    assert int(norm.num_batches_tracked) == 6
    objective, _ = partly_frozen(base="sha256 of the base model")
    train(objective, points, settings(), tmp_path / "whole")
    assert_bit_equal(tmp_path / "parts", tmp_path / "whole")


def test_buffers_that_do_not_change_are_not_saved_with_a_base(tmp_path):
    objective, norm = partly_frozen(base="sd15")
    norm.eval()

    result = train(objective, points, settings(steps=2), tmp_path)

    assert set(result.last) == {"net.linear.weight"}


def test_without_a_base_frozen_weights_are_saved_too(tmp_path):
    objective, _ = partly_frozen()

    result = train(objective, points, settings(steps=2), tmp_path)

    assert set(result.last) == {f"net.{name}" for name in objective.net.state_dict()}


def test_another_base_is_refused(tmp_path):
    train(partly_frozen(base="sd15")[0], points, settings(steps=2), tmp_path)

    with pytest.raises(TrainingError, match=r"objective.base sd15 \(now sd21\)"):
        train(partly_frozen(base="sd21")[0], points, settings(steps=4), tmp_path)


def test_a_parameter_frozen_since_is_refused_by_name(tmp_path):
    train(regression(base="sd15"), points, settings(steps=2), tmp_path)
    objective = regression(base="sd15")
    objective.net.bias.requires_grad_(False)

    with pytest.raises(TrainingError, match=r"weights do not fit: net.bias is \[2\] in the checkpoint, absent now"):
        train(objective, points, settings(steps=4), tmp_path)


@pytest.mark.parametrize("base", [None, "sd15"])
def test_checkpoints_of_format_2_with_all_weights_and_no_configuration_resume(tmp_path, base):
    train(partly_frozen()[0], points, settings(), tmp_path / "whole")
    train(partly_frozen()[0], points, settings(steps=3), tmp_path / "parts")
    rewrite(tmp_path / "parts", as_format_2, format=2)

    objective, _ = partly_frozen(base)
    with torch.no_grad():
        objective.net.linear.bias.fill_(9.0)  # a frozen parameter: the checkpoint has its value
    resumed = train(objective, points, settings(), tmp_path / "parts")

    found, expected = state.newest(tmp_path / "parts"), state.newest(tmp_path / "whole")
    assert found is not None and expected is not None
    for name, tensor in resumed.last.items():
        assert torch.equal(tensor, expected.tensors["weights"][name])
    assert torch.equal(objective.net.linear.bias, expected.tensors["weights"]["net.linear.bias"])
    assert found.values["objective"]["base"] == base


def test_changed_configuration_is_refused_in_one_line_with_each_name_then_and_now(tmp_path):
    train(regression(dropout=0.1, data="sha256 a", seed=0), points, settings(steps=2), tmp_path)
    objective = regression(dropout=0.2, data="sha256 b", noise_offset=0.05, seed=0)
    before = objective.net.weight.detach().clone()

    with pytest.raises(TrainingError) as caught:
        train(objective, points, settings(steps=4, batch=9), tmp_path)

    assert str(caught.value) == (
        f"{tmp_path}: was trained with objective.data sha256 a (now sha256 b), "
        "objective.dropout 0.1 (now 0.2), objective.noise_offset not set (now 0.05); "
        "resume with the original values, or use another folder"
    )
    assert torch.equal(objective.net.weight, before)


def test_changes_that_are_allowed_are_recorded_with_their_step(tmp_path):
    train(regression(scale=1), points, settings(steps=2), tmp_path)
    train(regression(scale=2), points, settings(steps=3, learning_rate=0.5), tmp_path)
    train(regression(scale=2), points, settings(steps=4, learning_rate=0.25), tmp_path)

    found = state.newest(tmp_path)
    assert found is not None
    assert found.values["changes"] == [
        {"step": 2, "name": "settings.learning_rate", "before": 0.01, "after": 0.5},
        {"step": 2, "name": "settings.steps", "before": 2, "after": 3},
        {"step": 2, "name": "objective.scale", "before": 1, "after": 2},
        {"step": 3, "name": "settings.learning_rate", "before": 0.5, "after": 0.25},
        {"step": 3, "name": "settings.steps", "before": 3, "after": 4},
    ]
    assert found.values["objective"]["scale"] == 2


def test_another_rate_on_resume_acts_at_once_and_leaves_the_optimizers_state_bit_equal(tmp_path):
    train(regression(), points, settings(steps=3, log_steps=1), tmp_path)
    stored = state.newest(tmp_path)
    assert stored is not None
    run = begin(regression(seed=9), settings(steps=4, learning_rate=0.5))
    restore(run, stored, tmp_path)
    for name, tensor in stored.tensors["optimizer"].items():
        parameter, _, key = name.rpartition(".")
        assert torch.equal(run.optimizer.state[run.parameters[parameter]][key], tensor)
    before = run.parameters["net.weight"].detach().clone()

    result = train(regression(seed=9), points, settings(steps=4, log_steps=1, learning_rate=0.5), tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["rate"] for line in lines] == [0.01, 0.01, 0.01, 0.5]
    assert (result.last["net.weight"] - before).abs().max() > 0.05  # Adam's steps have about the size of the rate


def test_another_rate_of_a_group_acts_at_once_and_is_recorded(tmp_path):
    def grouped(rate):
        net = linear()
        return Regression(net, (Group({"net.weight": net.weight}, rate), Group({"net.bias": net.bias}, 1.0, False)))

    before = train(grouped(1.0), points, settings(steps=2, weight_decay=0), tmp_path)
    after = train(grouped(0.0), points, settings(steps=4, weight_decay=0), tmp_path)

    assert torch.equal(after.last["net.weight"], before.last["net.weight"])
    assert not torch.equal(after.last["net.bias"], before.last["net.bias"])
    found = state.newest(tmp_path)
    assert found is not None
    assert {"step": 2, "name": "objective.groups.0.rate", "before": 1.0, "after": 0.0} in found.values["changes"]


@pytest.mark.parametrize("make", [autoencoder, contrastive, denoising])
def test_the_configuration_of_every_objective_is_json_and_names_its_settings(make):
    objective, _ = make()

    config = dict(objective.config())

    assert json.loads(json.dumps(config)) == config
    networks = {"vae", "text", "vision", "temperature", "denoiser", "networks", "unconditional", "groups", "encode"}
    assert {each.name for each in fields(objective)} - networks <= config.keys()


def test_the_configuration_of_denoising_identifies_schedule_and_prediction(tmp_path):
    objective, batches = fresh(denoising)
    train(objective, batches, settings(steps=2), tmp_path)
    unet = objective.networks["unet"]
    zero_snr = denoiser_factory(unet, Schedule.scaled_linear().zero_terminal_snr(), "eps")

    with pytest.raises(TrainingError) as caught:
        train(replace(objective, denoiser=zero_snr), batches, settings(steps=4), tmp_path)

    message = str(caught.value)
    assert "objective.prediction v (now eps)" in message
    assert "objective.schedule.sigma_max 14.6146 (now 4518.76)" in message
    assert message.count("(now") == 3 and "\n" not in message


def test_a_configuration_value_newer_than_the_checkpoint_had_its_default(tmp_path):
    objective, batches = fresh(denoising)
    train(objective, batches, settings(steps=2), tmp_path)

    def older(values):
        for name in ("gamma", "noise", "distance"):
            del values["objective"][name]

    rewrite(tmp_path, older)
    changed = replace(objective, gamma=4.0, noise=NoiseOptions(offset=0.1))

    train(changed, batches, settings(steps=4), tmp_path)

    found = state.newest(tmp_path)
    assert found is not None
    assert [change for change in found.values["changes"] if change["name"] != "settings.steps"] == [
        {"step": 2, "name": "objective.gamma", "before": 5.0, "after": 4.0},
        {"step": 2, "name": "objective.noise.offset", "before": 0.0, "after": 0.1},
    ]


def test_a_newer_value_that_may_not_change_and_differs_from_its_default_is_refused(tmp_path):
    objective, batches = fresh(denoising)
    train(objective, batches, settings(steps=2), tmp_path)
    rewrite(tmp_path, lambda values: values["objective"].pop("base"))

    with pytest.raises(TrainingError, match=r"objective.base not set \(now sd15\)"):
        train(replace(objective, base="sd15"), batches, settings(steps=4), tmp_path)
