"""Training without pictures: losses and gradients are those of LECO's definition with diffusers' networks and DDIM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import gouache
from gouache import Model
from gouache.adapters.attach import Adapters
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError
from gouache.prompts.encode import encode
from gouache.training import checkpointing
from gouache.training.concept_objective import ConceptObjective, ConceptValidation
from gouache.training.concepts import Concept, slider
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.options import AdapterOptions
from tests.pipelines import Narrow

STEPS = 5  # of denoising: whole strides of the 1000 levels, as diffusers has them
CONCEPTS = [
    Concept("a cat", "a red cat", "a dog", "a photo", "erase", 1.7, multiplier=-1.5, weight=0.7, size=(64, 128)),
    Concept("a cat", "a red cat", "a dog", "a photo", "enhance", 0.8, batch=1),
]


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    loaded: dict[str, Model] = {}

    def get(family: str) -> Model:
        if family not in loaded:
            loaded[family] = gouache.load(narrow(family).file, device="cpu", dtype="fp32")
        return loaded[family]

    return get


@contextmanager
def objective(model: Model, concepts: list[Concept] = CONCEPTS, **values: Any) -> Iterator[ConceptObjective]:
    """With an adapter on the attention of the middle block, whose parts are random."""
    target = AdapterTarget(model, AdapterOptions(ranks={"unet": 0, "M00": 2}, modules="attention", alpha=1), seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in target.adapter.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    texts = list(dict.fromkeys(text for each in concepts for text in each.prompts))
    with torch.no_grad():
        rows = encode(texts, model.tokenizer, model.text_encoders, model.text_recipe, pooled_only=True, emphasis="none")
    prompts = {text: rows.rows([index]) for index, text in enumerate(texts)}
    usual = {"seed": 3, "size": (64, 64), "batch": 2, "steps": STEPS, "recipe": model.text_recipe}
    try:
        yield ConceptObjective(model.denoiser, target, concepts, prompts, **{**usual, **values})
    finally:
        target.detach()


class Reference:
    """LECO's step written with diffusers' U-Net, text encoders and DDIM; the adapter's factors are added to weights."""

    def __init__(self, pipeline: Any, factors: dict[str, Tensor], family: str) -> None:
        import diffusers

        self.pipeline, self.factors = pipeline, factors
        self.scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            timestep_spacing="trailing", prediction_type="v_prediction" if family == "sd2" else "epsilon",
        )  # fmt: skip
        self.scheduler.set_timesteps(STEPS)

    def encoded(self, text: str) -> tuple[Tensor, Tensor | None]:
        pipe = self.pipeline
        if hasattr(pipe, "text_encoder_2"):
            context, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
            return context, pooled
        return pipe.encode_prompt(text, "cpu", 1, False)[0], None

    def predict(self, x: Tensor, t: Any, text: str, strength: float) -> Tensor:
        context, pooled = self.encoded(text)
        rows = len(x)
        added = None
        if pooled is not None:
            height, width = (8 * side for side in x.shape[2:])
            ids = torch.tensor([[height, width, 0, 0, height, width]] * rows, dtype=torch.float32)
            added = {"text_embeds": pooled.expand(rows, -1), "time_ids": ids}
        weights = dict(self.pipeline.unet.named_parameters())
        for name in {key.rpartition(".")[0] for key in self.factors}:
            key = f"mid_block.attentions.0.{name}.weight"
            change = self.factors[f"{name}.up"] @ self.factors[f"{name}.down"]
            weights[key] = weights[key] + strength * 0.5 * change  # alpha 1 of rank 2
        given = {"added_cond_kwargs": added} if added else {}
        return functional_call(self.pipeline.unet, weights, (x, t, context.expand(rows, -1, -1)), given).sample

    def loss(self, concept: Concept, noise: Tensor, steps: int) -> Tensor:
        latents, strength = noise, concept.multiplier
        with torch.no_grad():
            for t in self.scheduler.timesteps[:steps]:
                cond, uncond = (self.predict(latents, t, text, strength) for text in
                                (concept.target, concept.unconditional))  # fmt: skip
                latents = self.scheduler.step(uncond + 3.0 * (cond - uncond), t, latents).prev_sample
            t = self.scheduler.timesteps[steps]
            positive, neutral, unconditional = (
                self.predict(latents, t, text, 0.0)
                for text in (concept.positive, concept.neutral, concept.unconditional)
            )
            offset = concept.guidance * (positive - unconditional)
            wanted = neutral - offset if concept.action == "erase" else neutral + offset
        output = self.predict(latents, t, concept.target, strength)
        return concept.weight * torch.nn.functional.mse_loss(output, wanted)


@pytest.mark.parametrize("family", ["sd2", "sdxl", pytest.param("sd1", marks=pytest.mark.full)])
def test_loss_and_gradients_are_those_of_lecos_definition(family: str, models: Any, narrow: Callable[[str], Narrow]):
    with objective(models(family)) as training:
        adapter, factors = training.target.adapter, dict[str, Tensor]()
        for module in adapter.target_modules:
            name = module[1].removeprefix("middle_block.1.")
            for part, key in adapter.keys_of(module).items():
                if part != "alpha":
                    factors[f"{name}.{part[5:].partition('.')[0]}"] = getattr(adapter, key).detach().requires_grad_()
        reference = Reference(narrow(family).pipeline, factors, family)
        for number in range(2):  # both concepts
            draws = training.draws(number)
            adapter.zero_grad()
            ours = training.losses(None, number)["loss"]
            ours.backward()
            theirs = reference.loss(draws.concept, draws.noise, draws.steps)
            assert_close(ours, theirs, rtol=2e-4, atol=1e-6)
            gradients = torch.autograd.grad(theirs, list(factors.values()))
            scale = max(float(each.abs().max()) for each in gradients)
            found = [
                getattr(adapter, key).grad
                for module in adapter.target_modules
                for part, key in adapter.keys_of(module).items()
                if part != "alpha"
            ]
            for mine, other in zip(found, gradients, strict=True):
                assert_close(mine, other, rtol=1e-2, atol=1e-3 * scale)


class Gaussian(nn.Module):
    """The noise in x0 ~ N(mean, 1), exactly; the mean of a prompt is linear in its context."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.mean = nn.Linear(3, 4, bias=False)
        self.alphas = schedule.alphas_cumprod
        nn.init.orthogonal_(self.mean.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha = self.alphas[t.round().long()][:, None, None, None]
        mean = self.mean(context[:, 0])[:, :, None, None]
        return (1 - alpha).sqrt() * (x - alpha.sqrt() * mean)


SCHEDULE = Schedule.scaled_linear()
PROMPTS = {"person": (0.5, 1.0, 0.0), "old": (0.5, 1.0, 0.3), "young": (0.5, 1.0, -0.1), "": (0.0, 0.0, 0.0)}


@contextmanager
def gaussian(prediction: Any, concepts: list[Concept], steps: int) -> Iterator[tuple[ConceptObjective, Gaussian]]:
    """An adapter on a Gaussian, trained for so many steps."""
    network = Gaussian(SCHEDULE).requires_grad_(False)

    def denoiser(given: Conditioning) -> Denoiser:
        def call(x: Tensor, t: Tensor) -> Tensor:
            noise = network(x, t, given.context)
            if prediction == "eps":
                return noise
            alpha = network.alphas[t.round().long()][:, None, None, None]
            return (noise - (1 - alpha).sqrt() * x) / alpha.sqrt()  # v = (noise - sqrt(1 - alpha) x) / sqrt(alpha)

        return Denoiser(call, SCHEDULE, prediction)

    model: Any = SimpleNamespace(unet=network, text_encoders={}, text_recipe=SimpleNamespace(encoders=()))
    model.adapters = Adapters({"unet": network}, lambda *_: pytest.fail("no weight is read again"))
    target = AdapterTarget(model, AdapterOptions(rank=1, modules="all"), seed=0)
    prompts = {text: Conditioning(torch.tensor([[row]])) for text, row in PROMPTS.items()}
    training = ConceptObjective(denoiser, target, concepts, prompts, 0, size=(8, 8), batch=4, steps=10)
    optimizer = torch.optim.Adam(target.adapter.parameters(), lr=0.03)
    for number in range(steps):
        optimizer.zero_grad()
        training.losses(None, number)["loss"].backward()
        optimizer.step()
    try:
        yield training, network
    finally:
        target.detach()


def painted(training: ConceptObjective, strength: float) -> Tensor:
    """The mean picture (4,) of "person" at `strength`, by DDIM without guidance."""
    training.target.set_strength(strength)
    draws = training.draws_of(Concept("person", ""), torch.Generator().manual_seed(5))._replace(steps=10)
    draws = draws._replace(noise=torch.randn(512, 4, 1, 1, generator=torch.Generator().manual_seed(6)))
    levels = [*range(999, 0, -111), 0]
    x, sigmas = draws.noise * (SCHEDULE.sigma_max**2 + 1) ** 0.5, [SCHEDULE.sigma(level) for level in levels]
    denoiser = training.denoiser(training.prompts["person"].repeat(len(x)))
    with torch.no_grad():
        for sigma, following in pairwise([*sigmas, torch.tensor(0.0)]):
            x0 = denoiser(x, sigma)
            x = x0 + following / sigma * (x - x0)
    return x.mean((0, 2, 3))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_slider_moves_the_mean_of_what_is_painted_in_proportion_to_the_strength(prediction: str):
    concepts = slider("person", "old", "young", neutral="person", guidance=2.0)
    with gaussian(prediction, concepts, 200) as (training, network):
        direction = 2.0 * network.mean.weight @ torch.tensor([0.0, 0.0, 0.4])  # guidance times old minus young
        pictures = {strength: painted(training, strength) for strength in (-2, -1, 0, 1, 2)}
    measured = [float((picture - pictures[0]) @ direction / direction.norm() ** 2) for picture in pictures.values()]
    assert measured == pytest.approx([-2, -1, 0, 1, 2], abs=0.15)
    assert measured == sorted(measured)


def test_erasing_moves_the_prompt_away_from_its_own_direction():
    with gaussian("eps", [Concept("person", "person")], 300) as (training, network):
        mean = network.mean.weight @ torch.tensor(PROMPTS["person"])
        before, after = painted(training, 0.0), painted(training, 1.0)
    assert_close(after - before, -2 * mean, rtol=0, atol=0.2)  # from mean to neutral - (mean - 0) = -mean


def test_a_batch_is_a_function_of_seed_and_number(models: Any):
    model = models("sd1")
    with objective(model) as training:
        losses = [float(training.losses(None, number)["loss"].detach()) for number in range(4)]
        again = [float(training.losses(None, number)["loss"].detach()) for number in reversed(range(4))]
    with objective(model, seed=4) as training:
        other = [float(training.losses(None, number)["loss"].detach()) for number in range(4)]
    assert losses == again[::-1] and not set(losses) & set(other)


def test_concepts_take_turns_and_denoising_ends_at_every_step_but_the_last(models: Any):
    concepts = [Concept(f"cat {number}", "", dynamic=True, crops=True) for number in range(3)]
    with objective(models("sd1"), concepts, size=(512, 512), steps=4) as training:
        draws = [training.draws(number) for number in range(120)]
        assert [training.timestep(step) for step in range(4)] == [999, 749, 499, 249]
    for epoch in range(40):
        assert {each.concept.target for each in draws[3 * epoch : 3 * epoch + 3]} == {"cat 0", "cat 1", "cat 2"}
    orders = {tuple(each.concept.target for each in draws[3 * epoch : 3 * epoch + 3]) for epoch in range(40)}
    assert len(orders) == 6 and {each.steps for each in draws} == {1, 2, 3}
    assert {side for each in draws for side in each.sizes.size} == {256, 320, 384, 448, 512}
    for each in draws:
        (width, height), (left, top), original = each.sizes.size, each.sizes.crop, each.sizes.original
        assert original is not None and each.noise.shape[2:] == (height // 8, width // 8)
        assert width <= original[0] <= 3 * width and 0 <= left <= original[0] - width
        assert height <= original[1] <= 3 * height and 0 <= top <= original[1] - height


def test_validation_measures_fixed_latents_of_the_model_without_the_adapter(models: Any):
    with objective(models("sd1")) as training:
        validation = ConceptValidation(training, CONCEPTS, 3)
        first = validation()["loss"]
        cases = [(step, x.clone()) for _, step, x, _ in validation._cases]
        with torch.no_grad():
            for parameter in training.target.adapter.parameters():
                parameter.zero_()
        second = validation()["loss"]
        fresh = ConceptValidation(training, CONCEPTS, 3)
        assert fresh()["loss"] == second != first
        for (step, x), (_, again, other, _) in zip(cases, fresh._cases, strict=True):
            assert step == again and torch.equal(x, other)


def test_too_many_denoising_steps_are_refused(models: Any):
    with (
        pytest.raises(RequestError, match="denoising_steps: is 1001; expected 2 to 1000"),
        objective(models("sd1"), steps=1001),
    ):
        pass


def test_the_strength_is_that_of_the_batch_until_its_gradients_are_computed(models: Any):
    """Blocks with gradient checkpointing are evaluated again then."""
    model = models("sd1")
    gradients = []
    for checkpoints in (False, True):
        with objective(model) as training:
            disable = checkpointing.enable(model.unet) if checkpoints else lambda: None
            number = next(number for number in range(2) if training.draws(number).concept.multiplier < 0)
            training.losses(None, number)["loss"].backward()
            gradients.append([each.grad for each in training.target.adapter.parameters()])
            disable()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert any(bool(each.any()) for each in gradients[0])
