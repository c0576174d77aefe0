"""The options of the denoising objective: captions encoded now, priors, masks, weights, dropout through encoders."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError, TrainingError
from gouache.prompts.encode import Sizes
from gouache.training import state
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.loop import train
from gouache.training.noise import NoiseOptions
from gouache.training.objective import Group
from gouache.training.timesteps import Timesteps

from .toys import denoiser_factory, settings

SCHEDULE = Schedule.scaled_linear()
KEEP = torch.zeros(3, dtype=torch.bool)


class Stub(nn.Module):
    """In place of a U-Net: depends on all its inputs, and has one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.inputs: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *vector: Tensor) -> Tensor:
        self.inputs.append((x, t, context, *vector))
        return self.weight * x[:, :4] + context.mean((1, 2))[:, None, None, None]


class Frozen:
    """A target that trains the weight of a stub and can set it back."""

    def __init__(self, net: Stub) -> None:
        self.net, self.numbers = net, []
        self.start = net.weight.detach().clone()

    networks = property(lambda self: {"net": self.net})
    evaluated = networks
    trains_text = False

    def groups(self) -> list[Group]:
        return [Group({"adapter": self.net.weight}, rate=3.0)]

    def config(self) -> dict[str, Any]:
        return {"form": "stub", "rank": 4}

    def begin_batch(self, number: int) -> None:
        self.numbers.append(number)

    @contextmanager
    def frozen(self):
        trained = self.net.weight.detach().clone()
        self.net.weight.data.copy_(self.start)
        yield
        self.net.weight.data.copy_(trained)

    def export(self, *_: Any, **__: Any) -> None: ...


def objective(network: nn.Module, **values: Any) -> Denoising:
    plain = {"unconditional": Conditioning(torch.zeros(1, 3, 2)), "seed": 0, "dropout": 0.0, "weighting": "none"}
    return Denoising(denoiser_factory(network, SCHEDULE, "eps"), {"net": network}, **{**plain, **values})


def batch(count: int = 3, seed: int = 0, **values: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 4, 4, generator=generator)
    return Batch(latents, Conditioning(torch.rand(count, 3, 2, generator=generator)), **values)


def noise_of(given: Batch) -> Tensor:
    return torch.randn(given.latents.shape, generator=torch.Generator().manual_seed(1))


T = torch.tensor([10, 400, 900])


def loss(training: Denoising, given: Batch, drop: Tensor = KEEP) -> Tensor:
    with torch.no_grad():
        return training.loss(given, T, noise_of(given), drop)


def test_weights_multiply_the_losses_and_the_mean_is_over_the_pictures():
    network, given = Stub(), batch()
    each = objective(network)
    draws = each.draws(given, 7)
    losses = each.loss(given, draws.t, draws.noise, draws.drop)

    weighted = each.losses(replace(given, weights=torch.tensor([0.5, 0.0, 2.0])), 7)["loss"]

    assert_close(weighted, (0.5 * losses[0] + 2.0 * losses[2]) / 3)
    assert_close(each.losses(given, 7)["loss"], losses.mean())


def test_pictures_of_the_class_count_with_the_prior_weight_and_are_logged_by_themselves():
    given = batch(regularization=torch.tensor([False, True, False]), weights=torch.tensor([1.0, 0.5, 1.0]))
    training = objective(Stub(), prior_weight=0.3)
    draws = training.draws(given, 7)
    losses = training.loss(given, draws.t, draws.noise, draws.drop)

    found = training.losses(given, 7)

    assert_close(found["loss"], (losses[0] + 0.3 * 0.5 * losses[1] + losses[2]) / 3)
    assert_close(found["prior"], losses[1].detach())
    assert "prior" not in training.losses(batch(regularization=torch.zeros(3, dtype=torch.bool)), 7)


def test_the_target_of_the_frozen_prior_is_what_the_network_predicted_before_training():
    network = Stub()
    target = Frozen(network)
    given = batch(regularization=torch.tensor([False, True, False]))
    training = objective(network, target=target, prior="frozen")
    assert float(loss(training, given)[1]) == 0  # nothing has been trained yet
    with torch.no_grad():
        network.weight.fill_(0.9)

    found = loss(training, given)

    sigma = SCHEDULE.sigma(T)[1]
    x = (given.latents[1] + sigma * noise_of(given)[1]) / (1 + sigma**2).sqrt()
    assert_close(found[1], ((0.9 - 0.5) * x).pow(2).mean())
    assert_close(found[[0, 2]], loss(objective(network), given)[[0, 2]])
    assert network.weight.item() == pytest.approx(0.9)
    training.losses(given, 7)["loss"].backward()
    assert network.weight.grad is not None


def test_the_frozen_prior_needs_a_target():
    with pytest.raises(RequestError, match="prior: 'frozen' needs a target"):
        objective(Stub(), prior="frozen")


def test_a_target_gives_groups_and_configuration_and_begins_each_batch():
    target = Frozen(Stub())
    training = objective(target.net, target=target)

    training.losses(batch(), 41)
    training.losses(batch(), 42)

    assert target.numbers == [41, 42]
    assert [list(group.parameters) for group in training.parameter_groups()] == [["adapter"]]
    assert training.config()["target"] == {"form": "stub", "rank": 4}
    assert "target" not in training.changeable


def test_captions_are_encoded_now_with_their_gradient_and_dropped_ones_as_empty():
    network = Stub()
    table = nn.Parameter(torch.rand(9, 2))
    asked: list[tuple[list[str], tuple[Sizes, ...]]] = []

    def encode(captions, sizes):
        asked.append((list(captions), tuple(sizes)))
        return Conditioning(torch.stack([table[[len(caption)] * 3] for caption in captions]))

    sizes = (Sizes((64, 64)), Sizes((64, 96)), Sizes((32, 32)))
    given = Batch(batch().latents, captions=("a", "bb", "ccc"), sizes=sizes)
    training = objective(network, encode=encode)

    training.loss(given, T, noise_of(given), torch.tensor([False, True, False])).sum().backward()

    assert asked[-1] == (["a", "", "ccc"], sizes)
    assert table.grad is not None
    assert bool((table.grad[[0, 1, 3]] != 0).all()) and not bool(table.grad[2].any())


def test_captions_without_an_encoder_are_refused():
    given = Batch(batch().latents, captions=("a", "b", "c"))

    with pytest.raises(RequestError, match="encode: a batch has captions without conditioning"):
        loss(objective(Stub()), given)


@pytest.mark.parametrize("encoded_now", [False, True])
def test_the_concat_channels_of_a_batch_reach_the_network_also_where_the_caption_is_dropped(encoded_now):
    network = Stub()
    concat = torch.rand(3, 5, 4, 4)
    given = replace(batch(captions=("a", "b", "c")), concat=concat)
    if encoded_now:
        given = replace(given, conditioning=None)
    training = objective(network, encode=lambda captions, _: Conditioning(torch.zeros(len(captions), 3, 2)))

    loss(training, given, torch.tensor([True, False, True]))

    assert torch.equal(network.inputs[-1][0][:, 4:], concat)


def test_size_numbers_after_a_shorter_unconditional_vector_are_kept():
    network = Stub()
    given = batch()
    vector = torch.rand(3, 7)
    given = replace(given, conditioning=replace(given.conditioning, vector=vector))
    unconditional = Conditioning(torch.zeros(1, 3, 2), torch.full((1, 4), -1.0))

    loss(objective(network, unconditional=unconditional), given, torch.tensor([True, False, True]))

    seen = network.inputs[-1][3]
    assert torch.equal(seen[1], vector[1])
    assert torch.equal(seen[[0, 2], :4], torch.full((2, 4), -1.0))
    assert torch.equal(seen[:, 4:], vector[:, 4:])


def test_a_mask_limits_the_loss_and_its_gradient_to_a_part_of_the_picture():
    given = batch()
    mask = torch.zeros(3, 1, 4, 4)
    mask[:, :, :, 2:] = 1
    plain = objective(Stub())
    difference = plain._difference(given, T, noise_of(given), noise_of(given), KEEP)

    found = loss(plain, replace(given, mask=mask))

    assert_close(found, difference[:, :, :, 2:].pow(2).mean((1, 2, 3)).detach())


@pytest.mark.parametrize(
    ("values", "distance"),
    [
        ({"distance": "l1"}, lambda d, c: d.abs()),
        ({"distance": "huber"}, lambda d, c: 2 * c * ((d**2 + c**2).sqrt() - c)),
        ({"distance": "smooth-l1", "huber_c": 0.3}, lambda d, c: 2 * ((d**2 + c**2).sqrt() - c)),
    ],
)
def test_the_distance_is_applied_to_the_difference_of_output_and_target(values, distance):
    given, network = batch(), Stub()
    training = objective(network, **values)
    difference = training._difference(given, T, noise_of(given), noise_of(given), KEEP).detach()
    c = values.get("huber_c", 0.1)
    threshold = ((1 - c) / (1 + SCHEDULE.sigma(T)) ** 2 + c)[:, None, None, None]

    assert_close(loss(training, given), distance(difference, threshold).mean((1, 2, 3)))


@torch.no_grad()
def test_a_perturbed_input_has_the_noise_of_its_own_and_the_target_does_not():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    network, given = Stub(), batch()
    training = objective(network, noise=NoiseOptions(perturbation=0.1))
    draws = training.draws(given, 5)

    found = training.losses(given, 5)["loss"]

    x = network.inputs[-1][0]
    assert_close(x, scheduler.add_noise(given.latents, draws.input_noise, draws.t), atol=1e-4, rtol=1e-3)
    output = Stub()(x, draws.t, given.conditioning.context)
    assert_close(found, (output - draws.noise).pow(2).mean(), atol=1e-4, rtol=1e-3)
    assert float((draws.noise - draws.input_noise).abs().max()) > 0.05


def test_timesteps_are_those_of_the_chosen_range():
    network = Stub()

    objective(network, timesteps=Timesteps(first=600, last=650)).losses(batch(500), 0)

    t = network.inputs[-1][1].round()
    assert 600 <= int(t.min()) < 605 and 645 < int(t.max()) <= 649


def test_options_change_nothing_else_that_is_drawn():
    given = batch()
    plain = objective(Stub()).draws(given, 3)
    changed = objective(Stub(), noise=NoiseOptions(offset=0.1, perturbation=0.2), weighting="debiased").draws(given, 3)

    assert torch.equal(plain.t, changed.t) and torch.equal(plain.drop, changed.drop)
    assert_close((changed.noise - plain.noise).std((2, 3)), torch.zeros(3, 4), atol=1e-6, rtol=0)


def test_the_squared_error_depends_on_no_setting_of_the_loss():
    given = batch(regularization=torch.tensor([True, False, False]))
    network = Stub()
    plain = objective(network).squared_error(given, T, noise_of(given))
    other = objective(
        network, weighting="min-snr", distance="l1", channel_weights=torch.tensor([1.0, 2, 3, 4]), dropout=1.0,
        prior="frozen", target=Frozen(network),
    )  # fmt: skip

    assert torch.equal(other.squared_error(given, T, noise_of(given)), plain)
    assert_close(plain, loss(objective(network), given))


def test_a_description_names_the_pictures_and_their_timesteps():
    training = objective(Stub())
    t = training.draws(batch(), 3).t.tolist()

    assert training.describe(batch(names=("a.png", "b.png", "c.png")), 3) == (
        f"a.png at timestep {t[0]}, b.png at timestep {t[1]}, c.png at timestep {t[2]}"
    )
    assert training.describe(batch(), 3).startswith(f"picture 1 at timestep {t[0]}, picture 2")


def test_settings_of_the_loss_may_change_on_resume_and_what_is_trained_may_not(tmp_path):
    def batches(number: int) -> Batch:
        return batch(seed=number)

    def fresh(**values: Any) -> Denoising:
        network = Stub()
        return objective(network, target=Frozen(network), base="sd15", **values)

    whole = train(fresh(), batches, settings(steps=4), tmp_path / "whole")
    train(fresh(), batches, settings(steps=2), tmp_path / "changed")
    changed = {
        "weighting": "debiased", "distance": "l1", "noise": NoiseOptions(offset=0.1), "dropout": 0.5,
        "timesteps": Timesteps(first=500), "prior_weight": 0.5, "seed": 3, "data": "more pictures",
    }  # fmt: skip

    result = train(fresh(**changed), batches, settings(steps=4), tmp_path / "changed")

    assert not torch.equal(result.last["adapter"], whole.last["adapter"])
    stored = state.newest(tmp_path / "changed")
    assert stored is not None
    names = {each["name"].removeprefix("objective.").split(".")[0] for each in stored.values["changes"]}
    assert names == {*changed, "settings"}
    other = fresh()
    other.target.config = lambda: {"form": "stub", "rank": 8}
    with pytest.raises(TrainingError, match=r"was trained with objective.target.rank 4 \(now 8\); resume with"):
        train(other, batches, settings(steps=6), tmp_path / "changed")
