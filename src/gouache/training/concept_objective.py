"""Concepts erased, enhanced or put on a slider without pictures: the model's own predictions are the target.

    noise -> some denoising steps with the adapter on `target` -> x
    wanted = neutral -/+ guidance * (positive - unconditional), of the model without the adapter at x
    loss   = (prediction for `target` with the adapter at x - wanted)^2

Gandikota et al. 2023 (Erasing Concepts from Diffusion Models; Concept Sliders), as LECO and kohya's scripts do it for
adapters. A slider trains with both signs of the adapter's strength, so its file works with both.

The predictions are the network's output, eps or v. x0 = c_skip x + c_out output, and the factors of the three
predictions add up to 1, so the combination of outputs is that of the x0 predictions: it does not depend on what the
network predicts. The loss is that of the output, as in LECO; `weighting` changes how much each noise level counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning, stack
from gouache.diffusion.denoiser import Denoiser
from gouache.errors import RequestError
from gouache.prompts.encode import Sizes, add_sizes
from gouache.prompts.recipe import TextRecipe
from gouache.training.concepts import FACTOR, Concept, Size, identity
from gouache.training.denoising import describe_schedule, in_bfloat16
from gouache.training.evaluation import evaluating
from gouache.training.objective import Group, Json, step_generator
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.weighting import Weighting, level_weights


class Draws(NamedTuple):
    """What is random in a batch: its concept, how many denoising steps precede the loss, the sizes in pixels, and the
    first noise (B, C, h, w)."""

    concept: Concept
    steps: int
    sizes: Sizes
    noise: Tensor


@dataclass(frozen=True)
class ConceptObjective:
    """The squared error of `target`'s predictions for the `concepts`. A batch is None: its number is enough.

    `denoiser` returns the denoiser for a conditioning, as `Model.denoiser` does. `prompts` are the encoded prompts of
    all concepts, one row each, all of one shape and without sizes; `recipe` is the family's, for SDXL's sizes. `size`
    (width, height) in pixels and `batch` are those of concepts that have none; `channels` are the latents'.

    The concepts take turns in random order. Noise is denoised for 1 to `steps` - 1 of `steps` steps of DDIM, evenly
    over the timesteps, with `guidance` away from the unconditional prompt.

    The adapter keeps the strength of the last batch: blocks with gradient checkpointing are evaluated again later.
    """

    denoiser: Callable[[Conditioning], Denoiser]
    target: AdapterTarget
    concepts: Sequence[Concept]
    prompts: Mapping[str, Conditioning]
    seed: int
    size: Size = (512, 512)
    batch: int = 1
    channels: int = 4
    steps: int = 40
    guidance: float = 3.0
    weighting: Weighting = "none"
    gamma: float = 5.0
    recipe: TextRecipe | None = None
    autocast: bool = False
    base: str | None = None
    validation: str | None = None

    changeable: ClassVar[frozenset[str]] = frozenset(
        {"seed", "data", "validation", "autocast", "size", "steps", "guidance", "weighting", "gamma"}
    )

    def __post_init__(self) -> None:
        levels = len(self._any_denoiser.schedule.sigmas)
        if not 2 <= self.steps <= levels:
            raise RequestError("slider.denoising_steps", f"is {self.steps}; expected 2 to {levels}")

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self.target.networks

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        return self.target.evaluated

    def parameter_groups(self) -> list[Group]:
        return self.target.groups()

    def config(self) -> Mapping[str, Json]:
        denoiser = self._any_denoiser
        return {
            "type": "concepts",
            "prediction": denoiser.prediction,
            "schedule": describe_schedule(denoiser.schedule),
            "target": dict(self.target.config()),
            "size": list(self.size),
            "steps": self.steps,
            "guidance": self.guidance,
            "weighting": self.weighting,
            "gamma": self.gamma,
            "autocast": self.autocast,
            "seed": self.seed,
            "data": identity(self.concepts),
            "validation": self.validation,
            "base": self.base,
        }

    def losses(self, batch: Draws | None, number: int, /) -> Mapping[str, Tensor]:
        """Those of the draws of `number`, or of given ones."""
        self.target.begin_batch(number)
        return {"loss": self.loss(self.draws(number) if batch is None else batch)}

    def draws(self, number: int) -> Draws:
        """The random choices of batch `number`, which depend on that and the seed alone."""
        epoch, turn = divmod(number, len(self.concepts))
        # Negative numbers: no batch has them.
        order = torch.randperm(len(self.concepts), generator=step_generator(self.seed, -1 - epoch))
        return self.draws_of(self.concepts[int(order[turn])], step_generator(self.seed, number))

    def draws_of(self, concept: Concept, generator: torch.Generator) -> Draws:
        """The random choices of a batch of `concept`."""
        steps = int(torch.randint(1, self.steps, (), generator=generator))
        width, height = concept.size or self.size
        if concept.dynamic:
            width, height = (_between(side // 2, side, generator) for side in (width, height))
        sizes = Sizes((width, height))
        if concept.crops:
            scale = 1 + 2 * float(torch.rand((), generator=generator))
            original = int(width * scale), int(height * scale)
            corner = [
                int(torch.randint(original[each] - sizes.size[each] + 1, (), generator=generator)) for each in (0, 1)
            ]
            sizes = Sizes((width, height), original, (corner[0], corner[1]))
        shape = concept.batch or self.batch, self.channels, height // FACTOR, width // FACTOR
        return Draws(concept, steps, sizes, torch.randn(shape, generator=generator))

    def loss(self, draws: Draws) -> Tensor:
        """The loss of a batch, a scalar."""
        self.target.set_strength(draws.concept.multiplier)
        x = self.denoised(draws)[-1]
        return self.error(draws, draws.steps, x, self.wanted(draws, draws.steps, x))

    @torch.no_grad()
    def denoised(self, draws: Draws) -> list[Tensor]:
        """The latents (B, C, h, w), in variance-exploding scale, before the first step and after each."""
        denoiser = self._denoiser(draws, draws.concept.target, draws.concept.unconditional)
        sigmas = [self.sigma(step) for step in range(draws.steps + 1)]
        # Unit variance in the scale of the network's input, as other programs begin.
        xs = [draws.noise.to(next(iter(self.prompts.values())).context.device) * (sigmas[0] ** 2 + 1).sqrt()]
        for sigma, following in pairwise(sigmas):
            positive, negative = denoiser(torch.cat([xs[-1], xs[-1]]), sigma).chunk(2)
            x0 = negative + self.guidance * (positive - negative)
            xs.append(x0 + (following / sigma) * (xs[-1] - x0))
        return xs

    @torch.no_grad()
    def wanted(self, draws: Draws, step: int, x: Tensor) -> Tensor:
        """What the network's output at `x`, after `step` steps, is to become, (B, C, h, w)."""
        concept = draws.concept
        with self.target.frozen():
            denoiser = self._denoiser(draws, concept.positive, concept.unconditional, concept.neutral)
            positive, unconditional, neutral = denoiser.output(torch.cat([x] * 3), self.sigma(step)).chunk(3)
        sign = 1 if concept.action == "enhance" else -1
        return neutral + sign * concept.guidance * (positive - unconditional)

    def error(self, draws: Draws, step: int, x: Tensor, wanted: Tensor) -> Tensor:
        """The weighted mean squared error of the network's output at `x`, after `step` steps, a scalar."""
        denoiser = self._denoiser(draws, draws.concept.target)
        difference = denoiser.output(x, self.sigma(step)) - wanted
        snr = denoiser.schedule.snr(torch.tensor([self.timestep(step)]))
        weight = level_weights(self.weighting, self.gamma, denoiser.prediction, snr).to(difference)
        return draws.concept.weight * weight[0] * difference.pow(2).mean()

    def timestep(self, step: int) -> int:
        """That of the latents after `step` steps: the last one of the schedule before the first step."""
        levels = len(self._any_denoiser.schedule.sigmas)
        return levels - 1 - step * levels // self.steps

    def sigma(self, step: int) -> Tensor:
        """The noise level after `step` steps, a scalar."""
        return self._any_denoiser.schedule.sigma(torch.tensor(float(self.timestep(step))))

    def describe(self, batch: Any, number: int) -> str:
        """The concept of batch `number` and its timestep, for messages."""
        draws = self.draws(number)
        return f'"{draws.concept.target}" at timestep {self.timestep(draws.steps)}'

    def _denoiser(self, draws: Draws, *texts: str) -> Denoiser:
        """That of a batch in which the rows of a first prompt are followed by those of the next."""
        count = len(draws.noise)
        row = stack(*(self.prompts[text] for text in texts))
        conditioning = row.rows([index for index in range(len(texts)) for _ in range(count)])
        if self.recipe is not None:
            conditioning = add_sizes(conditioning, self.recipe, [draws.sizes] * len(conditioning))
        denoiser = self.denoiser(conditioning)
        return in_bfloat16(denoiser) if self.autocast else denoiser

    @cached_property
    def _any_denoiser(self) -> Denoiser:
        return self.denoiser(next(iter(self.prompts.values())))


@dataclass(frozen=True)
class ConceptValidation:
    """The error of the concepts at fixed latents: those that the model without the adapter makes of fixed noise.

    Nothing about it is random. `concepts` are some of the objective's, of each of which `points` steps are measured.
    """

    objective: ConceptObjective
    concepts: Sequence[Concept]
    points: int = 8

    @property
    def identity(self) -> str:
        return f"{self.points} steps of {identity(self.concepts)}"

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        with evaluating(self.objective.networks):
            losses = []
            for draws, step, x, wanted in self._cases:
                self.objective.target.set_strength(draws.concept.multiplier)
                losses.append(float(self.objective.error(draws, step, x, wanted)))
        return {"loss": sum(losses) / len(losses)}

    @cached_property
    def _cases(self) -> list[tuple[Draws, int, Tensor, Tensor]]:
        """(concept and noise, step, the latents there, what is wanted there); a few latents, which are kept."""
        objective, last = self.objective, self.objective.steps - 1
        points = min(self.points, last)
        steps = [1 + int((index + 0.5) * last / points) for index in range(points)]
        cases = []
        for number, concept in enumerate(self.concepts):
            draws = objective.draws_of(concept, step_generator(0, number))._replace(steps=last)
            with objective.target.frozen():
                xs = objective.denoised(draws)
            cases += [(draws, step, xs[step], objective.wanted(draws, step, xs[step])) for step in steps]
        return cases


def _between(low: int, high: int, generator: torch.Generator) -> int:
    """A random multiple of 64 (8 for small pictures) from `low` to `high`."""
    step = 64 if high >= 512 else FACTOR
    first, last = -(-low // step), high // step
    return step * int(torch.randint(first, last + 1, (), generator=generator))
