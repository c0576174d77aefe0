"""The samplers by name, with their aliases and their default spacings ("Automatic").

Names and defaults are those of A1111 1.10 where it has the sampler. Aliases are its old `k_` names and ComfyUI's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gouache.diffusion.names import normalize, suggestion
from gouache.diffusion.samplers import ddim, dpm, dpmpp, euler, lcm, lms, unipc
from gouache.diffusion.samplers.sampler import Sampler
from gouache.diffusion.schedule import Schedule
from gouache.diffusion.spacing import AUTOMATIC, SPACINGS, by_name
from gouache.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """A sampler and its properties.

    `spacing` is its default spacing ("Automatic"). `discard_penultimate`: the spacing is computed with one more level
    and the lowest is dropped, since the sampler would spend two evaluations on a tiny step. `starts_vp`: the initial
    noise is scaled by sqrt(1 + sigma^2) instead of sigma. `ends_at_lowest`: the last level is the model's lowest, not
    0, and the result is the latent at that level. `uses_noise`: by default it adds noise during the run.
    `least_steps`: with fewer its pictures tend to be in pieces where others' are not, measured with the embedded model
    at guidance scale 4, as distance from a run of 100 steps; 0 for samplers that need no more than usual.
    """

    name: str
    function: Sampler
    spacing: str = "Uniform"
    aliases: tuple[str, ...] = ()
    discard_penultimate: bool = False
    starts_vp: bool = False
    ends_at_lowest: bool = False
    uses_noise: bool = False
    least_steps: int = 0

    @property
    def knobs(self) -> tuple[str, ...]:
        """The names of the function's additional settings: `eta`, `s_churn`, `order`, ..."""
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
        least_steps=15,
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
        least_steps=20,
    ),
    SamplerInfo(name="DDIM", function=ddim.ddim, spacing="DDIM", starts_vp=True, ends_at_lowest=True),
    SamplerInfo(
        name="PLMS",
        function=ddim.plms,
        spacing="DDIM",
        aliases=("pndm",),
        starts_vp=True,
        ends_at_lowest=True,
        least_steps=20,
    ),
    # In A1111 UniPC's timesteps are even from the last to the lowest, both included: SGM Uniform down to the lowest.
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
    # The named spacing most similar to the timesteps that LCMs are distilled for: 999, 749, 499, 249.
    SamplerInfo(name="LCM", function=lcm.lcm, spacing="SGM Uniform", uses_noise=True),
)


def find(name: str, schedule: str | None = None) -> tuple[SamplerInfo, str]:
    """The sampler called `name`, and the name of the spacing to use (never "Automatic"). Raises RequestError.

    `name` is any name or alias, ignoring case, spaces and underscores. It may end in a spacing's name
    ("DPM++ 2M Karras", "k_dpmpp_2m_ka"), which then overrides `schedule`, as in A1111.
    """
    for info in SAMPLERS:
        if _has_name(info, normalize(name)):
            if schedule is None or normalize(schedule) == normalize(AUTOMATIC):
                return info, info.spacing
            return info, by_name(schedule).name
    for spacing in SPACINGS:
        for ending in (f" {normalize(each)}" for each in (spacing.name, *spacing.aliases)):
            for info in SAMPLERS:
                if normalize(name).endswith(ending) and _has_name(info, normalize(name).removesuffix(ending)):
                    return info, spacing.name
    raise RequestError("sampler", f"{name!r} is not known; {suggestion(name, [info.name for info in SAMPLERS])}")


def sampler(name: str) -> Sampler:
    """The function of the sampler called `name`: (denoise, x, sigmas, *, noise, on_step) -> x. Raises RequestError."""
    return find(name)[0].function


def plan(info: SamplerInfo, spacing: str, schedule: Schedule, steps: int) -> Tensor:
    """The sigmas (steps + 1,) of a run: float32 on the CPU, decreasing to 0, or with `ends_at_lowest` to sigma_min.

    The last level is 0 if the spacing already includes the lowest level. Raises RequestError for steps below 1.
    """
    if steps < 1:
        raise RequestError("steps", f"{steps} is too few; expected at least 1")
    spacing_function = by_name(spacing).function
    if info.discard_penultimate:
        try:
            sigmas = spacing_function(schedule, steps + 1)
        except RequestError:
            raise RequestError("steps", f"{steps} are too many: {info.name} needs one level more; use fewer") from None
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    else:
        sigmas = spacing_function(schedule, steps)
    if info.ends_at_lowest and sigmas[-2] > schedule.sigma_min:
        sigmas[-1] = schedule.sigma_min
    return sigmas


def start(info: SamplerInfo, unit_noise: Tensor, sigmas: Tensor) -> Tensor:
    """The initial x of a run from pure noise: `unit_noise` (B, C, H, W) scaled to the first level."""
    return unit_noise * ((1 + sigmas[0] ** 2).sqrt() if info.starts_vp else sigmas[0])


def finish(x: Tensor, sigmas: Tensor) -> Tensor:
    """The latent at the end of a run: x in variance-preserving scale, equal to x if the last level is 0."""
    return x / (1 + sigmas[-1] ** 2).sqrt()


def _has_name(info: SamplerInfo, normalized_name: str) -> bool:
    return normalized_name in map(normalize, (info.name, *info.aliases))
