"""Validation on a fixed grid: the numbers of an independent computation, the same each time, without side effects."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.schedule import Schedule
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.evaluation import evaluating
from gouache.training.loop import train
from gouache.training.objective import step_generator
from gouache.training.timesteps import Timesteps
from gouache.training.validation import Validation, grid_losses, timestep_grid

from .toys import denoiser_factory, settings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)
        nn.init.eye_(self.mix.weight[:, :, 0, 0])

    def forward(self, x, t, context):
        return self.drop(self.mix(x)) + context.mean((1, 2))[:, None, None, None]


def objective(**values) -> Denoising:
    torch.manual_seed(0)
    factory = denoiser_factory(net := Net(), Schedule.scaled_linear(), values.pop("prediction", "eps"))
    return Denoising(factory, {"net": net}, Conditioning(torch.zeros(1, 2, 2)), **{"seed": 3, **values})


def batch(number: int, count: int = 3) -> Batch:
    generator = step_generator(9, number)
    latents = torch.randn(count, 4, 4, 4, generator=generator)
    contents = tuple(f"{number} {row}" for row in range(count))
    return Batch(latents, Conditioning(torch.randn(count, 2, 2, generator=generator)), contents=contents)


def noise_of(content: str, t: int) -> torch.Tensor:
    seed = int(hashlib.sha256(f"validation {content}".encode()).hexdigest()[:15], 16)
    return torch.randn(4, 4, 4, generator=step_generator(seed, t))


@pytest.mark.parametrize(("prediction", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_the_losses_are_the_mean_squared_errors_of_diffusers_scheduler_at_each_timestep(prediction, name):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name)
    training, batches = objective(prediction=prediction), [batch(0), batch(1, count=2)]

    found = Validation(training, batches, points=4)()

    net = training.networks["net"].eval()
    expected = {t: [] for t in (125, 375, 625, 875)}
    for each in batches:
        for t in expected:
            noise = torch.stack([noise_of(content, t) for content in each.contents])
            times = torch.full((len(each),), t)
            with torch.no_grad():
                output = net(scheduler.add_noise(each.latents, noise, times), times, each.conditioning.context)
            wanted = noise if prediction == "eps" else scheduler.get_velocity(each.latents, noise, times)
            expected[t] += (output - wanted).pow(2).mean((1, 2, 3)).tolist()
    means = {t: sum(errors) / 5 for t, errors in expected.items()}
    assert {name: value for name, value in found.items() if name != "loss"} == {
        f"loss at {t}": pytest.approx(mean, rel=1e-3) for t, mean in means.items()
    }
    assert found["loss"] == pytest.approx(sum(means.values()) / 4, rel=1e-3)


def test_two_validations_of_the_same_weights_are_equal_and_settings_of_the_loss_do_not_matter():
    first = objective()
    second = objective(weighting="debiased", distance="l1", dropout=1.0)

    losses = Validation(first, [batch(0)])()

    assert Validation(first, [batch(0)])() == losses == Validation(second, [batch(0)])()


def test_the_losses_do_not_depend_on_the_seed_the_batches_or_their_order():
    whole = batch(0, 5)
    context = whole.conditioning.context

    def rows(*rows: int) -> Batch:
        picked = list(rows)
        contents = tuple(whole.contents[row] for row in rows)
        return Batch(whole.latents[picked], Conditioning(context[picked]), contents=contents)

    losses = Validation(objective(), [whole])()
    for seed, batches in ((4, [whole]), (3, [rows(4, 1), rows(0), rows(3, 2)]), (5, [rows(row) for row in range(5)])):
        assert Validation(objective(seed=seed), batches)() == pytest.approx(losses, rel=1e-6)
    assert Validation(objective(), [rows(0)])() != pytest.approx(Validation(objective(), [rows(1)])(), rel=1e-3)


@pytest.mark.parametrize("change", [{"validation": "b"}, {"timesteps": Timesteps(last=500)}, {"dropout": 0.5}])
def test_losses_of_another_validation_are_not_compared_with_the_earlier_ones(change, tmp_path):
    chosen = {"log_steps": 1, "validate_steps": 1, "learning_rate": 1e-9, "patience": 2, "minimum_change": 100.0}
    notes = list[str]()

    def go(steps: int, **values) -> int:
        training = objective(**{"validation": "a", "dropout": 0.0, **values})
        validation = Validation(training, [batch(100)], points=2)
        return train(
            training, batch, settings(**chosen, steps=steps), tmp_path, validate=validation, on_note=notes.append
        ).step

    assert go(2) == 2
    notes.clear()
    # One validation was the first and one without a lower loss: patience ends the run after one more, or anew.
    is_other = "dropout" not in change
    assert go(20, **change) == (5 if is_other else 3)
    assert [note for note in notes if "looked for anew" in note] == notes[: int(is_other)]
    notes.clear()
    assert go(20, **change) == (5 if is_other else 3) and not [note for note in notes if "anew" in note]


def test_validation_uses_no_dropout_no_gradient_and_no_global_random_numbers_and_restores_the_modes():
    training = objective()
    net = training.networks["net"]
    net.mix.eval()
    before = torch.get_rng_state()

    Validation(training, [batch(0)])()

    assert net.drop.training and not net.mix.training and net.mix.weight.grad is None
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="inside"), evaluating(training.networks):
        assert not net.drop.training
        raise RuntimeError("inside")
    assert net.drop.training


def test_the_probe_is_the_training_loss_or_alone_everything():
    training = objective()
    training.networks["net"].eval()

    both = Validation(training, [batch(0)], [batch(1)])()
    alone = Validation(training, probe=[batch(1)])()

    assert both["training loss"] == alone["loss"] == grid_losses(training, [batch(1)], 8)["loss"]
    assert both["loss"] == grid_losses(training, [batch(0)], 8)["loss"] != alone["loss"]
    assert "training loss" not in alone


def test_the_grid_is_within_the_trained_timesteps():
    assert timestep_grid(objective(), 4) == [125, 375, 625, 875]
    assert timestep_grid(objective(timesteps=Timesteps(first=100, last=200)), 2) == [125, 175]
    assert timestep_grid(objective(timesteps=Timesteps(first=7, last=9)), 8) == [7, 8]


def test_a_mask_limits_the_validation_loss():
    training, given = objective(), batch(0)
    mask = torch.zeros(3, 1, 4, 4)
    mask[:, :, 1:3] = 1
    noise = torch.randn(given.latents.shape, generator=step_generator(0, 5))
    t = torch.tensor([100, 500, 900])
    training.networks["net"].eval()

    found = training.squared_error(Batch(given.latents, given.conditioning, mask=mask), t, noise)

    difference = training._difference(given, t, noise, noise, torch.zeros(3, dtype=torch.bool))
    assert_close(found, difference[:, :, 1:3].pow(2).mean((1, 2, 3)))


def test_a_run_validates_averages_and_last_weights_and_resumes_with_the_same_log(tmp_path):
    chosen = {"log_steps": 1, "validate_steps": 2, "ema_decay": 0.5, "learning_rate": 0.05}

    def go(folder, steps: int) -> None:
        training = objective(dropout=0.0)
        training.networks["net"].drop.p = 0.0
        validation = Validation(training, [batch(100)], [batch(0)], points=2)
        train(training, batch, settings(**chosen, steps=steps), tmp_path / folder, validate=validation)

    go("whole", 6)
    for steps in (3, 5, 6):
        go("parts", steps)

    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 6 and "validation loss" in line]
    assert {name.removeprefix("validation ") for name in last} == {
        "step", "loss", "loss at 250", "loss at 750", "training loss",
        "raw loss", "raw loss at 250", "raw loss at 750", "raw training loss",
    }  # fmt: skip
    assert last["validation loss"] != last["validation raw loss"]
    resumed = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    # A run that was ended at step 3 or 5 validated there too; all else is the same.
    assert [line for line in resumed if json.loads(line)["step"] not in (3, 5) or "loss" in json.loads(line)] == [
        json.dumps(line) for line in lines
    ]
