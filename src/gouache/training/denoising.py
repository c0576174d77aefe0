"""The objective of latent diffusion: predict the noise (or velocity) in a noised latent from its conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser, Prediction
from gouache.diffusion.denoiser import target as training_target
from gouache.diffusion.schedule import Schedule
from gouache.errors import RequestError
from gouache.prompts.encode import Sizes
from gouache.training.batch import Batch
from gouache.training.noise import WHITE, NoiseOptions, sample_noise
from gouache.training.objective import Group, Json, by_decay, step_generator
from gouache.training.target import Target
from gouache.training.timesteps import ALL, Timesteps
from gouache.training.weighting import (
    Distance,
    HuberSchedule,
    Weighting,
    distance,
    huber_threshold,
    level_weights,
    masked_mean,
    v_like,
)  # fmt: skip

Encode = Callable[[Sequence[str], Sequence[Sizes]], Conditioning]
"""(captions, sizes) -> conditioning with a row per caption, through text encoders that are trained."""


class Draws(NamedTuple):
    """The random numbers of a batch: timesteps t (B,), the noise of target and input (B, C, h, w), and which captions
    are dropped (B,)."""

    t: Tensor
    noise: Tensor
    input_noise: Tensor
    drop: Tensor


@dataclass(frozen=True)
class Denoising:
    """The weighted error of a denoiser's network at random timesteps.

    `denoiser` returns the denoiser for a conditioning, as `Model.denoiser` does; its schedule and prediction are the
    ones trained for. `networks` are the modules it evaluates that are trained. `groups` are the trained parameters,
    by default those of `target`, or all trainable ones of `networks`. `encode` is needed for batches without
    conditioning, when a text encoder is trained.

    The caption of a share `dropout` of the pictures is dropped, so that the network also learns the unconditional
    prediction of classifier-free guidance: `unconditional` (one row) replaces the conditioning, or "" the caption if it
    is encoded now. Parts that `unconditional` does not have, such as the concat channels of an inpainting model, are
    kept. If its vector is shorter than the pictures', the numbers that follow (the sizes of SDXL) are kept too.

    `weighting` weights the loss by noise level, see `weighting.level_weights`. "min-snr" gives almost no weight to the
    noisiest levels; "velocity" is the inherent weight of v-prediction (also chosen by Karras et al. 2022), with which a
    small model learns the layout of an image from its first steps. `v_like_loss` adds that share of the loss as
    v-prediction would weight it. `channel_weights` (C,) multiply the errors of the latent channels. `distance` is the
    measure of an error; `huber_c`, `huber_scale` and `huber_schedule` are its threshold.

    A batch's mask limits the loss to a part of each picture, normalised by its area; elsewhere the weight is
    `unmasked_weight`. Pictures of the class (DreamBooth) count `prior_weight`. With `prior` "frozen" their target is
    not the noise but what the network predicted before training; this needs `target`.

    `autocast` runs the network in bfloat16 where that is faster. `data` identifies the data set, `validation` what the
    validation measures, and `base` the weights of frozen parameters, for instance by a hash; they are compared when a
    run is resumed.
    """

    denoiser: Callable[[Conditioning], Denoiser]
    networks: Mapping[str, nn.Module]
    unconditional: Conditioning
    seed: int
    dropout: float = 0.1
    gamma: float = 5.0
    weighting: Weighting = "min-snr"
    channel_weights: Tensor | None = None
    autocast: bool = False
    groups: tuple[Group, ...] = ()
    data: str | None = None
    validation: str | None = None
    base: str | None = None
    target: Target | None = None
    encode: Encode | None = None
    noise: NoiseOptions = WHITE
    timesteps: Timesteps = ALL
    v_like_loss: float = 0.0
    distance: Distance = "l2"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    huber_schedule: HuberSchedule = "snr"
    unmasked_weight: float = 0.0
    prior_weight: float = 1.0
    prior: Literal["pictures", "frozen"] = "pictures"

    changeable: ClassVar[frozenset[str]] = frozenset(
        {"dropout", "seed", "data", "validation", "autocast", "noise", "timesteps"}  # what is trained on
        | {"weighting", "gamma", "v_like_loss", "channel_weights", "unmasked_weight", "prior_weight", "prior"}
        | {"distance", "huber_c", "huber_scale", "huber_schedule"}
    )

    def __post_init__(self) -> None:
        if self.prior == "frozen" and self.target is None:
            raise RequestError("prior", "'frozen' needs a target, whose networks can compute as before training")

    @property
    def schedule(self) -> Schedule:
        return self._unconditional_denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        return self._unconditional_denoiser.prediction

    def parameter_groups(self) -> list[Group]:
        if self.groups:
            return list(self.groups)
        return self.target.groups() if self.target is not None else by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        # Without the numbers in `unconditional`: they come from a text encoder, whose last bits depend on the machine.
        weights = self.channel_weights
        return {
            "type": "denoising",
            "prediction": self.prediction,
            "schedule": describe_schedule(self.schedule),
            "target": None if self.target is None else dict(self.target.config()),
            "dropout": self.dropout,
            "noise": asdict(self.noise),
            "timesteps": asdict(self.timesteps),
            "weighting": self.weighting,
            "gamma": self.gamma,
            "v_like_loss": self.v_like_loss,
            "channel_weights": None if weights is None else [_rounded(value) for value in weights.tolist()],
            "distance": self.distance,
            "huber_c": self.huber_c,
            "huber_scale": self.huber_scale,
            "huber_schedule": self.huber_schedule,
            "unmasked_weight": self.unmasked_weight,
            "prior_weight": self.prior_weight,
            "prior": self.prior,
            "autocast": self.autocast,
            "seed": self.seed,
            "data": self.data,
            "validation": self.validation,
            "base": self.base,
        }

    def losses(self, batch: Batch, number: int) -> Mapping[str, Tensor]:
        """The mean of the weighted losses; "prior" is that of the pictures of the class, without their weight."""
        if self.target is not None:
            self.target.begin_batch(number)
        draws = self.draws(batch, number)
        if batch.part is not None and batch.conditioning is None:
            dropped = self._draws_of_all(batch, number).drop.tolist()
            batch = replace(batch, longest=batch.part.longest(dropped))
        each = self.loss(batch, draws.t, draws.noise, draws.drop, draws.input_noise)
        weights = torch.ones_like(each) if batch.weights is None else batch.weights.to(each)
        if batch.regularization is None:
            return {"loss": (weights * each).mean()}
        prior, part = batch.regularization.to(each.device), batch.part
        count = int(prior.sum()) if part is None else part.regularization
        if not count:
            return {"loss": (weights * each).mean()}
        weights = torch.where(prior, self.prior_weight * weights, weights)
        share = count if part is None else count / part.processes  # the loop takes the mean over the processes
        return {"loss": (weights * each).mean(), "prior": each.detach()[prior].sum() / share}

    def draws(self, batch: Batch, number: int) -> Draws:
        """The random numbers of batch `number`, which depend on nothing but that, the seed and the latents' shape.

        With several processes they are drawn for the whole batch, of which each process has a part.
        """
        own = slice(None) if batch.part is None else batch.part.own
        t, noise, input_noise, drop = self._draws_of_all(batch, number)
        return Draws(t[own], noise[own].to(batch.latents), input_noise[own].to(batch.latents), drop[own])

    def _draws_of_all(self, batch: Batch, number: int) -> Draws:
        """On the CPU."""
        generator, latents = step_generator(self.seed, number), batch.latents
        if (part := batch.part) is not None:
            latents = torch.zeros(part.count, *latents.shape[1:])
            latents[part.own] = batch.latents.to(latents)
        t = self.timesteps.sample(len(latents), len(self.schedule.sigmas), generator)
        drop = torch.rand(len(latents), generator=generator) < self.dropout
        noise, input_noise = sample_noise(latents, self.noise, generator)
        return Draws(t, noise, input_noise, drop)

    def loss(self, batch: Batch, t: Tensor, noise: Tensor, drop: Tensor, input_noise: Tensor | None = None) -> Tensor:
        """The loss of each picture (B,) at timesteps t (B,) with `noise` (B, C, h, w), weighted by noise level.

        The captions are dropped where `drop` (B,) is true. `input_noise` is what the input has instead of `noise`.
        """
        difference = self._difference(batch, t, noise, noise if input_noise is None else input_noise, drop)
        threshold = huber_threshold(self.huber_schedule, self.huber_c, self.huber_scale, self.schedule, t)
        error = distance(self.distance, difference, threshold)
        if self.channel_weights is not None:
            error = error * self.channel_weights.to(error)[:, None, None]
        return self.loss_weights(t).to(error) * masked_mean(error, batch.mask, self.unmasked_weight)

    def squared_error(self, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error (B,) of the network's output at t (B,), within the masks; no other weights act.

        So it can be compared between runs with other settings of the loss.
        """
        keep = torch.zeros(len(batch), dtype=torch.bool)
        batch = replace(batch, regularization=None)
        return masked_mean(self._difference(batch, t, noise, noise, keep).pow(2), batch.mask)

    def loss_weights(self, t: Tensor) -> Tensor:
        """The weights (B,) of the error of the network's output (eps or v) at timesteps t (B,)."""
        snr = self.schedule.snr(t)
        weights = level_weights(self.weighting, self.gamma, self.prediction, snr)
        return weights * v_like(self.v_like_loss, snr) if self.v_like_loss else weights

    @property
    def evaluated(self) -> Mapping[str, nn.Module]:
        """The networks that losses evaluate, whether they are trained or carry an adapter that is."""
        return self.networks if self.target is None else self.target.evaluated

    def describe(self, batch: Batch, number: int) -> str:
        """The pictures of batch `number` and their timesteps, for messages."""
        t = self.draws(batch, number).t.tolist()
        names = batch.names or tuple(f"picture {row + 1}" for row in range(len(batch)))
        return ", ".join(f"{name} at timestep {time}" for name, time in zip(names, t))

    def _difference(self, batch: Batch, t: Tensor, noise: Tensor, input_noise: Tensor, drop: Tensor) -> Tensor:
        """The network's output minus its target, (B, C, h, w)."""
        sigma = self.schedule.sigma(t)
        # Before the graph of the output is made: a target may change weights in place meanwhile.
        prior = self._prior(batch, input_noise, sigma, drop)
        denoiser = self._denoiser(self._conditioning(batch, drop))
        output, _ = denoiser.loss_terms(batch.latents, input_noise, sigma)
        wanted = training_target(denoiser.prediction, batch.latents.to(output), noise.to(output), sigma)
        if prior is not None:
            rows, outputs = prior
            wanted = wanted.index_copy(0, rows.to(wanted.device), outputs.to(wanted))
        return output - wanted

    @torch.no_grad()
    def _prior(self, batch: Batch, noise: Tensor, sigma: Tensor, drop: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rows whose target is the frozen network's output, and that output; None if there are none."""
        if self.prior == "pictures" or batch.regularization is None or not bool(batch.regularization.any()):
            return None
        assert self.target is not None
        index = batch.regularization.cpu().nonzero().flatten()
        rows = index.tolist()
        with self.target.frozen():
            denoiser = self._denoiser(self._conditioning(batch, drop).rows(rows))
            return index, denoiser.loss_terms(batch.latents[rows], noise[rows], sigma[rows])[0]

    def _conditioning(self, batch: Batch, drop: Tensor) -> Conditioning:
        if batch.conditioning is not None:
            conditioning = batch.conditioning.where(drop, _with_numbers_of(batch.conditioning, self.unconditional))
        elif self.encode is not None:
            captions = ["" if dropped else caption for caption, dropped in zip(batch.captions, drop.tolist())]
            if batch.longest is not None:
                sizes = batch.sizes + batch.sizes[:1]
                conditioning = self.encode([*captions, batch.longest], sizes).rows(slice(len(captions)))
            else:
                conditioning = self.encode(captions, batch.sizes)
        else:
            raise RequestError("encode", "a batch has captions without conditioning, and there is no text encoder")
        return conditioning if batch.concat is None else replace(conditioning, concat=batch.concat)

    def _denoiser(self, conditioning: Conditioning) -> Denoiser:
        denoiser = self.denoiser(conditioning)
        return in_bfloat16(denoiser) if self.autocast else denoiser

    @cached_property
    def _unconditional_denoiser(self) -> Denoiser:
        return self.denoiser(self.unconditional)


def describe_schedule(schedule: Schedule) -> dict[str, Json]:
    """What identifies a schedule in a configuration. Zero-terminal SNR, for instance, shows as a sigma_max of 4518.8.

    Six digits rather than a hash: the last bit of a level may depend on the processor.
    """
    return {
        "levels": len(schedule.sigmas),
        "sigma_min": _rounded(schedule.sigma_min),
        "sigma_median": _rounded(float(schedule.sigmas.median())),
        "sigma_max": _rounded(schedule.sigma_max),
        "continuous": schedule.continuous,
    }


def _with_numbers_of(conditioning: Conditioning, unconditional: Conditioning) -> Conditioning:
    """`unconditional` with the last numbers of each row's vector where its own vector is shorter."""
    vector, short = conditioning.vector, unconditional.vector
    if vector is None or short is None or short.shape[1] >= vector.shape[1]:
        return unconditional
    numbers = vector[:, short.shape[1] :]
    return replace(
        unconditional.rows([0] * len(conditioning)),
        vector=torch.cat([short.to(vector).expand(len(vector), -1), numbers], dim=1),
    )


def _rounded(value: float) -> float:
    """To six significant digits."""
    return float(f"{value:.6g}")


def in_bfloat16(denoiser: Denoiser) -> Denoiser:
    """The same denoiser, its network computed in bfloat16."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return denoiser.network(x, t)

    return replace(denoiser, network=network)
