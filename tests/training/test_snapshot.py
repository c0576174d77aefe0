"""Resuming inside one process: every objective goes on bit-equal, and what does not fit is refused by name."""

from __future__ import annotations

import hashlib
import json

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
from gouache.training.contrastive import Contrast, Pairs
from gouache.training.denoising import Captioned, Denoising
from gouache.training.loop import train
from gouache.training.objective import Group, chance
from gouache.training.snapshot import begin, put_back

from .toys import Regression, pictures, points, regression, settings, small_autoencoder


def autoencoder():
    return small_autoencoder(), pictures


def contrastive():
    text = ClipText(TextSpec(width=16, layers=1, heads=2, mlp_width=16, vocabulary=10, positions=5, projection=8))
    vision = ClipVision(VisionSpec(width=16, layers=1, heads=2, mlp_width=16, image_size=8, patch_size=4, projection=8))

    def pairs(number: int) -> Pairs:
        drawn = chance(2, number)
        return Pairs(torch.randn(4, 3, 8, 8, generator=drawn), torch.randint(0, 10, (4, 5), generator=drawn))

    return Contrast(text, vision), pairs


def denoising():
    unet = UNet(UNetSpec(channels=32, channel_mult=(1,), res_blocks=1, attention_depth=(1,), heads=4, context_dim=8))
    unet = unet.to(memory_format=torch.channels_last)

    def captioned(number: int) -> Captioned:
        drawn = chance(3, number)
        said = Conditioning(torch.randn(2, 3, 8, generator=drawn))
        return Captioned(torch.randn(2, 4, 4, 4, generator=drawn), said)

    return Denoising(unet, Schedule.scaled_linear(), "v", Conditioning(torch.zeros(1, 3, 8)), seed=4), captioned


def fresh(make):
    """The objective as at the start of a sitting: the same weights each time, far from those of a trained one."""
    objective, batches = make()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in objective.networks.values():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.2)
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
def test_a_run_in_three_sittings_is_bit_equal_to_one_in_a_single_one(tmp_path, make):
    given = {"accumulate": 2, "warmup": 2, "ema_decay": 0.9, "log_steps": 1}
    objective, batches = fresh(make)
    whole = train(objective, batches, settings(steps=6, **given), tmp_path / "whole")

    for steps in (2, 3, 6):
        objective, batches = fresh(make)
        parts = train(objective, batches, settings(steps=steps, **given), tmp_path / "parts")

    assert_bit_equal(tmp_path / "parts", tmp_path / "whole")
    torch.testing.assert_close(dict(parts.weights), dict(whole.weights), rtol=0, atol=0)
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_what_the_optimizer_remembers_lies_in_memory_as_it_did_before(tmp_path):
    objective, batches = fresh(autoencoder)
    train(objective, batches, settings(steps=2), tmp_path)
    stored = state.newest(tmp_path)
    assert stored is not None
    objective, _ = fresh(autoencoder)
    run = begin(objective, settings(steps=2))

    put_back(run, stored, tmp_path)

    channels_last = [parameter for parameter in run.parameters.values() if not parameter.is_contiguous()]
    assert channels_last
    for parameter in channels_last:
        assert run.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_which_is_set_aside(tmp_path):
    train(regression(), points, settings(steps=6), tmp_path / "whole")
    train(regression(), points, settings(steps=4, save_seconds=1e-9, log_steps=1), tmp_path / "parts")
    newest = tmp_path / "parts" / "step-00000004" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])

    train(regression(seed=9), points, settings(steps=6, log_steps=1), tmp_path / "parts")

    assert_bit_equal(tmp_path / "parts", tmp_path / "whole")
    assert (tmp_path / "parts" / "step-00000004.bad").is_dir()
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_again_by_itself(tmp_path):
    train(regression(), points, settings(steps=3, save_seconds=1e-9), tmp_path)
    for path in state.checkpoints(tmp_path):
        (path / "manifest.json").unlink()

    for _ in range(2):
        with pytest.raises(TrainingError, match="damaged"):
            train(regression(), points, settings(steps=6), tmp_path)


def test_a_lowest_validation_loss_of_an_earlier_sitting_still_counts(tmp_path):
    train(regression(), points, settings(steps=2, validate_steps=2), tmp_path, validate=lambda: {"loss": 1.0})
    best = (tmp_path / "best.safetensors").read_bytes()

    train(regression(), points, settings(steps=4, validate_steps=2), tmp_path, validate=lambda: {"loss": 2.0})
    assert (tmp_path / "best.safetensors").read_bytes() == best

    train(regression(), points, settings(steps=6, validate_steps=2), tmp_path, validate=lambda: {"loss": 0.5})
    assert (tmp_path / "best.safetensors").read_bytes() != best


def test_a_log_line_that_a_kill_cut_short_is_written_again_whole(tmp_path):
    train(regression(), points, settings(steps=4, log_steps=1), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')

    train(regression(), points, settings(steps=6, log_steps=1), tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_format_1_numbered_the_optimizers_parameters_and_are_read(tmp_path):
    train(regression(), points, settings(steps=6), tmp_path / "whole")
    train(regression(), points, settings(steps=3), tmp_path / "parts")
    path = tmp_path / "parts" / "step-00000003"
    moments = load_file(path / "optimizer.safetensors")
    numbers = {"net.weight": "0", "net.bias": "1"}  # matrices, which decay, stand before vectors
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
    ("changed", "words"),
    [
        ({"learning_rate": 0.5}, r"learning_rate 0.01 \(now 0.5\)"),
        ({"betas": (0.9, 0.999)}, r"betas \[0.9, 0.99\]"),
        ({"seed": 3, "batch": 9}, r"batch 4 \(now 9\), seed 0 \(now 3\)"),
        ({"ema_decay": 0}, r"ema_decay 0.999 \(now 0.0\)"),
    ],
)
def test_a_changed_setting_that_the_numbers_depend_on_is_refused_by_name(tmp_path, changed, words):
    train(regression(), points, settings(steps=2), tmp_path)
    objective = regression()
    before = objective.net.weight.detach().clone()

    with pytest.raises(TrainingError, match=words):
        train(objective, points, settings(steps=4, **changed), tmp_path)

    assert torch.equal(objective.net.weight, before)
    kept = state.newest(tmp_path)
    assert kept is not None and kept.step == 2


def test_how_often_a_run_tells_and_saves_may_change(tmp_path):
    train(regression(), points, settings(steps=2), tmp_path)

    result = train(
        regression(), points, settings(steps=3, log_steps=1, validate_steps=7, save_seconds=1, keep=5), tmp_path
    )

    assert result.step == 3


def test_a_setting_younger_than_the_checkpoint_counts_as_its_default_and_one_gone_since_is_named(tmp_path):
    train(regression(), points, settings(steps=2), tmp_path)
    _rewrite_settings(tmp_path, lambda stored: stored.pop("final_rate"))

    assert train(regression(), points, settings(steps=3), tmp_path).step == 3

    _rewrite_settings(tmp_path, lambda stored: stored.update(dropout=0.3))
    with pytest.raises(TrainingError, match=r"dropout 0\.3"):
        train(regression(), points, settings(steps=4), tmp_path)


def _rewrite_settings(folder, change):
    path = state.checkpoints(folder)[-1]
    values = json.loads((path / "state.json").read_text())
    change(values["settings"])
    data = json.dumps(values).encode()
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Linear(3, 5), r"other networks: net.bias is \[2\], now \[5\]"),
        (nn.Linear(3, 2, bias=False), r"other networks: net.bias is \[2\], now absent"),
    ],
)
def test_a_run_of_other_networks_is_refused(tmp_path, net, words):
    train(regression(), points, settings(steps=2), tmp_path)

    with pytest.raises(TrainingError, match=words):
        train(Regression(net), points, settings(steps=4), tmp_path)


def test_a_run_that_trained_other_parameters_of_the_same_networks_is_refused(tmp_path):
    train(regression(), points, settings(steps=2, ema_decay=0), tmp_path / "plain")
    train(regression(), points, settings(steps=2), tmp_path / "averaged")
    net = regression().net
    only_bias = Regression(net, (Group({"net.bias": net.bias}),))

    with pytest.raises(TrainingError, match=r"trained net.weight, which is not trained now"):
        train(only_bias, points, settings(steps=4, ema_decay=0), tmp_path / "plain")
    with pytest.raises(TrainingError, match=r"other averages: net.weight"):
        train(only_bias, points, settings(steps=4), tmp_path / "averaged")
