"""The samplers under the names users know, and what each means by "Automatic".

Names and defaults are A1111 1.10's where it has the sampler. Aliases are its old `k_` names and ComfyUI's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gouache.diffusion.names import closest, plain
from gouache.diffusion.samplers import ddim, dpm, dpmpp, euler, lcm, lms, unipc
from gouache.diffusion.samplers.sampler import Sampler
from gouache.diffusion.schedule import Schedule
from gouache.diffusion.spacing import AUTOMATIC, SPACINGS, by_name
from gouache.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """A sampler and its habits.

    `spacing` is what "Automatic" means for it. `discard_penultimate`: one level more is spaced out and the lowest left
    out, since the sampler would spend two evaluations on a tiny step. `starts_vp`: a run from pure noise starts at
    sqrt(1 + sigma^2) times it, rather than at sigma times. `ends_at_lowest`: the last level is the model's lowest
    instead of 0, and the picture is read off there. `uses_noise`: it draws noise while it runs, unless told otherwise.
    """

    name: str
    function: Sampler
    spacing: str = "Uniform"
    aliases: tuple[str, ...] = ()
    discard_penultimate: bool = False
    starts_vp: bool = False
    ends_at_lowest: bool = False
    uses_noise: bool = False

    @property
    def knobs(self) -> tuple[str, ...]:
        """The settings of its own that the function takes: `eta`, `s_churn`, `order`, ..."""
        parameters = inspect.signature(self.function).parameters.values()
        names = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
        return tuple(name for name in names if name not in ("noise", "on_step"))


SAMPLERS = (
    SamplerInfo(name="DPM++ 2M", function=dpmpp.dpmpp_2m, spacing="Karras"),
    SamplerInfo(
        name="DPM++ SDE", function=dpmpp.dpmpp_sde, spacing="Karras", aliases=("dpmpp_sde_gpu",), uses_noise=True
    ),
    SamplerInfo(
        name="DPM++ 2M SDE",
        function=dpmpp.dpmpp_2m_sde,
        spacing="Exponential",
        aliases=("dpmpp_2m_sde_gpu",),
        uses_noise=True,
    ),
    SamplerInfo(
        name="DPM++ 2M SDE Heun",
        function=partial(dpmpp.dpmpp_2m_sde, solver_type="heun"),
        spacing="Exponential",
        aliases=("dpmpp_2m_sde_heun_gpu",),
        uses_noise=True,
    ),
    SamplerInfo(
        name="DPM++ 2S a",
        function=dpmpp.dpmpp_2s_ancestral,
        spacing="Karras",
        aliases=("dpmpp_2s_ancestral",),
        uses_noise=True,
    ),
    SamplerInfo(
        name="DPM++ 3M SDE",
        function=dpmpp.dpmpp_3m_sde,
        spacing="Exponential",
        aliases=("dpmpp_3m_sde_gpu",),
        discard_penultimate=True,
        uses_noise=True,
    ),
    SamplerInfo(name="Euler a", function=euler.euler_ancestral, aliases=("euler_ancestral",), uses_noise=True),
    SamplerInfo(name="Euler", function=euler.euler),
    SamplerInfo(name="LMS", function=lms.lms),
    SamplerInfo(name="Heun", function=euler.heun),
    SamplerInfo(name="DPM2", function=dpm.dpm2, spacing="Karras", aliases=("dpm_2",), discard_penultimate=True),
    SamplerInfo(
        name="DPM2 a",
        function=dpm.dpm2_ancestral,
        spacing="Karras",
        aliases=("dpm_2_a", "dpm_2_ancestral"),
        discard_penultimate=True,
        uses_noise=True,
    ),
    SamplerInfo(name="DDIM", function=ddim.ddim, spacing="DDIM", starts_vp=True, ends_at_lowest=True),
    SamplerInfo(
        name="PLMS", function=ddim.plms, spacing="DDIM", aliases=("pndm",), starts_vp=True, ends_at_lowest=True
    ),
    # A1111 spaces UniPC evenly in time from the last level to the lowest, both visited: SGM Uniform, ending there.
    SamplerInfo(
        name="UniPC",
        function=unipc.unipc,
        spacing="SGM Uniform",
        aliases=("uni_pc",),
        starts_vp=True,
        ends_at_lowest=True,
    ),
    SamplerInfo(name="DEIS", function=lms.deis),
    SamplerInfo(name="DDPM", function=ddim.ddpm, starts_vp=True, uses_noise=True),
    # The nearest named spacing to the levels that latent consistency models are distilled for: 999, 749, 499, 249.
    SamplerInfo(name="LCM", function=lcm.lcm, spacing="SGM Uniform", uses_noise=True),
)


def find(name: str, schedule: str | None = None) -> tuple[SamplerInfo, str]:
    """The sampler called `name`, and the name of the spacing to use, never "Automatic".

    `name` is any name or alias, whatever its case, spaces and underscores, and may end in a spacing's name
    ("DPM++ 2M Karras", "k_dpmpp_2m_ka"), which then counts more than `schedule`, as in A1111.
    """
    for info in SAMPLERS:
        if _is_called(info, plain(name)):
            if schedule is None or plain(schedule) == plain(AUTOMATIC):
                return info, info.spacing
            return info, by_name(schedule).name
    for spacing in SPACINGS:
        for ending in map(plain, (spacing.name, *spacing.aliases)):
            for info in SAMPLERS:
                if plain(name).endswith(" " + ending) and _is_called(info, plain(name).removesuffix(" " + ending)):
                    return info, spacing.name
    raise RequestError("sampler", f"{name!r} is not known; {closest(name, [info.name for info in SAMPLERS])}")


def plan(info: SamplerInfo, spacing: str, schedule: Schedule, steps: int) -> Tensor:
    """The sigmas (steps + 1,) of a run: float32 on the CPU, falling to 0, or to the lowest level if `info` ends there.

    The last level is 0 in any case when the spacing already visits the lowest.
    """
    if steps < 1:
        raise RequestError("steps", f"{steps} is too few; a run takes at least 1 step")
    space = by_name(spacing).function
    if info.discard_penultimate:
        sigmas = space(schedule, steps + 1)
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    else:
        sigmas = space(schedule, steps)
    if info.ends_at_lowest and sigmas[-2] > schedule.sigma_min:
        sigmas[-1] = schedule.sigma_min
    return sigmas


def start(info: SamplerInfo, unit_noise: Tensor, sigmas: Tensor) -> Tensor:
    """x at the head of a run from pure noise: `unit_noise` scaled to the first level."""
    return unit_noise * ((1 + sigmas[0] ** 2).sqrt() if info.starts_vp else sigmas[0])


def finish(x: Tensor, sigmas: Tensor) -> Tensor:
    """The latent at the end of a run: x in the variance-preserving scale, the same thing if the last level is 0."""
    return x / (1 + sigmas[-1] ** 2).sqrt()


def _is_called(info: SamplerInfo, plain_name: str) -> bool:
    return plain_name in map(plain, (info.name, *info.aliases))
