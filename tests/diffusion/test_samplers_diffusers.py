"""Samplers compared with the schedulers of diffusers, on the same levels with the same noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from gouache.diffusion.samplers.catalog import find, finish, plan
from gouache.diffusion.samplers.ddim import ddim, ddpm, plms
from gouache.diffusion.samplers.lcm import lcm
from gouache.diffusion.samplers.lms import deis
from gouache.diffusion.samplers.unipc import unipc
from gouache.diffusion.schedule import Schedule

from .mixture import mixture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


class SchedulerNoise:
    """The noise of a diffusers scheduler with a generator of the same seed, in the same order."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def draw(self) -> Tensor:
        return torch.randn((2, 1, 3, 3), generator=self.generator, dtype=torch.float64)

    def between(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        raise NotImplementedError


def x_start() -> Tensor:
    return torch.randn((2, 1, 3, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def their_run(scheduler, levels: list[float], **step_settings) -> Tensor:
    """x in the variance-preserving scale after all the scheduler's timesteps; `levels` has each one's sigma."""
    x = x_start()
    for t, sigma in zip(scheduler.timesteps, levels, strict=True):
        x_ve = x * (1 + sigma**2) ** 0.5
        eps = (x_ve - mixture(x_ve, torch.tensor(sigma))) / sigma
        x = scheduler.step(eps, t, x, **step_settings).prev_sample
    return x


def levels_of(scheduler, timesteps: Tensor) -> list[float]:
    alphas = scheduler.alphas_cumprod[timesteps].double()
    return ((1 - alphas) / alphas).sqrt().tolist()


def our_run(sampler, levels: list[float], **settings) -> Tensor:
    sigmas = torch.tensor(levels, dtype=torch.float64)
    x = sampler(mixture, x_start() * (1 + sigmas[0] ** 2).sqrt(), sigmas, noise=SchedulerNoise(), **settings)
    return finish(x, sigmas)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_ddim_gives_the_result_of_diffusers(steps, eta):
    scheduler = DDIMScheduler(**LEADING, clip_sample=False)
    scheduler.set_timesteps(steps)
    levels = levels_of(scheduler, scheduler.timesteps)

    theirs = their_run(scheduler, levels, eta=eta, generator=torch.Generator().manual_seed(4))

    ours = our_run(ddim, [*levels, *levels_of(scheduler, torch.tensor([0]))], eta=eta)
    assert_same(ours, theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_plms_gives_the_result_of_diffusers(steps):
    scheduler = PNDMScheduler(**LEADING, skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.unique().flip(0)

    theirs = their_run(scheduler, levels_of(scheduler, scheduler.timesteps))

    ours = our_run(plms, levels_of(scheduler, torch.cat([timesteps, torch.tensor([0])])))
    assert_same(ours, theirs)


def test_the_catalog_gives_ddim_and_plms_the_levels_of_diffusers():
    scheduler = DDIMScheduler(**LEADING)
    scheduler.set_timesteps(20)
    theirs = levels_of(scheduler, torch.cat([scheduler.timesteps, torch.tensor([0])]))

    for name in ("DDIM", "PLMS"):
        sigmas = plan(*find(name), Schedule.scaled_linear(), 20)
        torch.testing.assert_close(sigmas.double(), torch.tensor(theirs, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_ddpm_gives_the_result_of_diffusers(steps):
    scheduler = DDPMScheduler(**BETAS, timestep_spacing="leading", clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    # the last timestep is 0, whose noise level is above 0
    levels = levels_of(scheduler, scheduler.timesteps)

    theirs = their_run(scheduler, levels, generator=torch.Generator().manual_seed(4))

    assert_same(our_run(ddpm, [*levels, 0.0]), theirs)


# With bh1 the step to level 0 gives NaN in diffusers.
@pytest.mark.parametrize(("variant", "last"), [("bh1", "sigma_min"), ("bh2", "sigma_min"), ("bh2", "zero")])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_gives_the_result_of_diffusers(order, variant, last):
    scheduler = UniPCMultistepScheduler(
        **BETAS, solver_order=order, solver_type=variant, final_sigmas_type=last, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas = scheduler.sigmas.double()
    levels = scheduler.sigmas.tolist()

    theirs = their_run(scheduler, levels[:-1])

    assert_same(our_run(unipc, levels, order=order, variant=variant), theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_gives_the_result_of_diffusers(order, steps):
    scheduler = DEISMultistepScheduler(**BETAS, solver_order=order, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    levels = scheduler.sigmas.tolist()

    theirs = their_run(scheduler, levels[:-1])

    assert_same(our_run(deis, levels, order=order), theirs)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_gives_the_result_of_diffusers(steps):
    scheduler = LCMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(steps)
    levels = levels_of(scheduler, scheduler.timesteps)

    theirs = their_run(scheduler, levels, generator=torch.Generator().manual_seed(4))

    assert_same(our_run(lcm, [*levels, 0.0]), theirs)
