"""A loss, gradient or weight that is not finite: named with its place, then the run stops or skips the step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.schedule import Schedule
from gouache.errors import TrainingError
from gouache.training import state
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.loop import train
from gouache.training.nonfinite import MOST_SKIPPED
from gouache.training.objective import step_generator

from .toys import Regression, denoiser_factory, linear, points, regression, settings


@dataclass(frozen=True)
class Poisoned(Regression):
    """Not finite at some batches: in the loss, or in it and not its gradient, or in the gradient and not the loss."""

    bad: frozenset[int] = frozenset()
    where: str = "loss"

    def losses(self, batch, number, /):
        good = super().losses(batch, number)["loss"]
        if number not in self.bad:
            return {"loss": good}
        if self.where == "loss":
            return {"loss": good * math.nan}
        if self.where == "loss alone":
            return {"loss": good + math.inf}
        # sqrt has an infinite slope at zero
        return {"loss": good + (self.net.weight.sum() * 0).sqrt()}


def poisoned(*bad: int, where: str = "loss", seed: int = 0) -> Poisoned:
    return Poisoned(linear(seed), bad=frozenset(bad), where=where)


@pytest.mark.parametrize(
    ("where", "first"), [("loss", "the loss itself"), ("loss alone", "the loss itself"), ("gradient", "net.weight")]
)
@pytest.mark.parametrize("save_seconds", [1e-9, 1e9])
def test_it_stops_with_everything_before_that_step_saved(tmp_path, where, first, save_seconds):
    good = train(regression(), points, settings(steps=3), tmp_path / "good")
    objective = poisoned(3, where=where)

    with pytest.raises(TrainingError, match=rf"step 4: .*not finite \(loss .*{first}.*checkpoint of step 3") as caught:
        train(objective, points, settings(save_seconds=save_seconds), tmp_path / "bad")

    stored = state.newest(tmp_path / "bad")
    assert stored is not None and stored.step == 3
    torch.testing.assert_close(dict(stored.tensors["weights"]), dict(good.last), rtol=0, atol=0)
    assert "\n" not in str(caught.value) and 'not_finite = "skip"' in str(caught.value)
    assert torch.isfinite(objective.net.weight).all()


def test_the_error_for_a_first_step_that_is_not_finite_states_that_nothing_was_saved(tmp_path):
    with pytest.raises(TrainingError, match=r"step 1: .*no checkpoint was saved yet"):
        train(poisoned(0), points, settings(), tmp_path)

    assert state.newest(tmp_path) is None


def test_a_run_that_stopped_can_go_on_by_skipping(tmp_path):
    with pytest.raises(TrainingError):
        train(poisoned(3), points, settings(), tmp_path / "run")

    notes: list[str] = []
    found = train(poisoned(3, seed=9), points, settings(not_finite="skip"), tmp_path / "run", on_note=notes.append)

    expected = train(poisoned(3), points, settings(not_finite="skip"), tmp_path / "whole", on_note=notes.append)
    torch.testing.assert_close(dict(found.last), dict(expected.last), rtol=0, atol=0)
    assert len(notes) == 2 and all("step 4: " in each and each.endswith("the step is skipped") for each in notes)


def without_step(skipped: int, steps: int) -> dict[str, torch.Tensor]:
    """The weights after a plain loop with AdamW that leaves out one step."""
    net = linear()
    groups = [{"params": [net.weight], "weight_decay": 0.01}, {"params": [net.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for step in range(steps):
        if step == skipped:
            continue
        x, y = points(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return {f"net.{name}": value.detach() for name, value in net.named_parameters()}


@pytest.mark.parametrize("where", ["loss", "loss alone", "gradient"])
def test_a_skipped_step_changes_nothing_and_the_others_are_done(tmp_path, where):
    chosen = settings(not_finite="skip", log_steps=1)

    result = train(poisoned(2, where=where), points, chosen, tmp_path, on_note=lambda _: None)

    assert result.finished
    torch.testing.assert_close(dict(result.last), without_step(2, 6))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["loss" in line for line in lines] == [True, True, False, True, True, True]
    assert [line.get("skipped", 0) for line in lines] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("steps", [(2, 4, 6), (3, 6), (5, 6)])
def test_a_run_with_a_skipped_step_resumes_bit_equal(tmp_path, steps):
    chosen = {"not_finite": "skip", "log_steps": 1, "ema_decay": 0.9}
    quiet = {"on_note": lambda _: None}
    whole = train(poisoned(2), points, settings(**chosen), tmp_path / "whole", **quiet)

    for each in steps[:-1]:
        start = poisoned(2, seed=0 if each == steps[0] else 9)
        train(start, points, settings(**{**chosen, "steps": each}), tmp_path / "parts", **quiet)
    parts = train(poisoned(2, seed=9), points, settings(**chosen), tmp_path / "parts", **quiet)

    torch.testing.assert_close(dict(parts.last), dict(whole.last), rtol=0, atol=0)
    torch.testing.assert_close(dict(parts.weights), dict(whole.weights), rtol=0, atol=0)
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


class Fragile(torch.optim.SGD):
    """Gradient descent that divides by zero if a gradient is large, as Adam does if its moments underflow."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad.abs().max() > 1e5:
                    parameter.fill_(math.nan)


@dataclass(frozen=True)
class Steep(Regression):
    """The gradient of one batch is finite and large."""

    at: int = 4

    def losses(self, batch, number, /):
        loss = super().losses(batch, number)["loss"]
        return {"loss": loss * 1e7 if number == self.at else loss}


FRAGILE = {"optimizer": f"{__name__}.Fragile", "clip_norm": 0, "weight_decay": 0}


@pytest.mark.parametrize("save_steps", [1, 3, 4])
def test_an_update_that_breaks_the_weights_is_undone_and_skipped(tmp_path, save_steps):
    chosen = settings(**FRAGILE, steps=8, not_finite="skip", save_steps=save_steps, log_steps=1, keep=1)
    notes: list[str] = []
    calls: list[int] = []  # previews, and below 0 the steps returned to

    result = train(
        Steep(linear()), points, chosen, tmp_path, on_note=notes.append, preview_steps=range(9),
        on_preview=calls.append, on_return=lambda step: calls.append(-step),
    )  # fmt: skip

    (note,) = notes
    returned = 4 - 4 % save_steps
    assert calls[calls.index(-returned, 1) + 1] == returned + 1  # previews are made again from there
    assert note.startswith("step 5: its update made weights that are not finite")
    assert note.endswith(f"the run returns to step {returned} and skips step 5")
    net = linear()
    for number in range(8):
        if number != 4:
            x, y = points(number)
            net.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.01 * parameter.grad
    torch.testing.assert_close(result.last["net.weight"], net.weight.detach())
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert [path.name for path in state.checkpoints(tmp_path)] == ["step-00000008"]


def test_without_a_checkpoint_to_return_to_broken_weights_stop_the_run(tmp_path):
    chosen = settings(**FRAGILE, not_finite="skip")

    with pytest.raises(TrainingError, match=r"step 2: its update made weights.*there is no checkpoint to return to"):
        train(Steep(linear(), at=1), points, chosen, tmp_path)

    assert state.newest(tmp_path) is None


@pytest.mark.parametrize("steps", [5, 6])
def test_broken_weights_are_never_saved(tmp_path, steps):
    with pytest.raises(TrainingError, match=r"step 5: its update.*the checkpoint of step 4 is good"):
        train(Steep(linear()), points, settings(**FRAGILE, steps=steps, save_steps=1), tmp_path)

    found = state.newest(tmp_path)
    assert found is not None and found.step == 4


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    notes: list[str] = []

    with pytest.raises(TrainingError, match=f"step {MOST_SKIPPED + 3}: .*{MOST_SKIPPED} steps before it were skipped"):
        train(poisoned(*range(2, 99)), points, settings(steps=99, not_finite="skip"), tmp_path, on_note=notes.append)

    assert len(notes) == MOST_SKIPPED


class Overflowing(nn.Module):
    """A network whose second layer overflows for one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU())

    def forward(self, x, t, context):
        return self.second(self.first(x) / (1 - context[:, :1, :1, None]))


def test_the_pictures_the_layer_and_the_timesteps_are_named(tmp_path):
    network = Overflowing()
    factory = denoiser_factory(network, Schedule.scaled_linear(), "eps")
    training = Denoising(factory, {"unet": network}, Conditioning(torch.zeros(1, 1, 1)), seed=0, dropout=0.0)

    def batches(number: int) -> Batch:
        latents = torch.randn(2, 4, 4, 4, generator=step_generator(1, number))
        bad = float(number == 5)  # the second batch of the third step
        names = (f"{number}-a.png", f"{number}-b\x1b.png")
        return Batch(latents, Conditioning(torch.tensor([0.0, bad]).reshape(2, 1, 1)), names=names)

    t = training.draws(batches(5), 5).t.tolist()
    notes: list[str] = []
    train(training, batches, settings(accumulate=2, not_finite="skip"), tmp_path, on_note=notes.append)

    assert notes == [
        "step 3: a loss or gradient is not finite (loss nan), first in unet.second.0 (Conv2d); "
        f"5-a.png at timestep {t[0]}, 5-b\\x1b.png at timestep {t[1]}; the step is skipped"
    ]
    assert not any(module._forward_hooks for module in network.modules())


class Named(Poisoned):
    def describe(self, batch, number: int, /) -> str:
        return f"picture {number}"


@pytest.mark.parametrize(("where", "named"), [("loss", "picture 3"), ("gradient", "picture 2; picture 3")])
def test_if_only_gradients_are_not_finite_all_pictures_of_the_step_are_named(tmp_path, where, named):
    objective = Named(linear(), bad=frozenset({3}), where=where)

    with pytest.raises(TrainingError, match=rf"step 2: .*, first in [^;]*; {named}; the checkpoint of step 1 is good"):
        train(objective, points, settings(accumulate=2), tmp_path)
