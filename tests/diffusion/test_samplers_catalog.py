from __future__ import annotations

import math

import pytest
import torch

from gouache.diffusion.noise import Noise
from gouache.diffusion.samplers.catalog import SAMPLERS, find, finish, plan, start
from gouache.diffusion.samplers.sampler import Step
from gouache.diffusion.schedule import Schedule
from gouache.diffusion.spacing import SPACINGS
from gouache.errors import RequestError

from .mixture import mixture

SCHEDULE = Schedule.scaled_linear()
ZERO_SNR = SCHEDULE.zero_terminal_snr()
NAMES = [info.name for info in SAMPLERS]
SHAPE = (1, 2, 3)


@pytest.mark.parametrize(
    ("typed", "sampler", "spacing"),
    [
        # the defaults of A1111 1.10 ("Automatic")
        ("DPM++ 2M", "DPM++ 2M", "Karras"),
        ("DPM++ SDE", "DPM++ SDE", "Karras"),
        ("DPM++ 2M SDE", "DPM++ 2M SDE", "Exponential"),
        ("DPM++ 3M SDE", "DPM++ 3M SDE", "Exponential"),
        ("DPM++ 2S a", "DPM++ 2S a", "Karras"),
        ("Euler a", "Euler a", "Uniform"),
        ("Euler", "Euler", "Uniform"),
        ("LMS", "LMS", "Uniform"),
        ("Heun", "Heun", "Uniform"),
        ("DPM2", "DPM2", "Karras"),
        ("DPM2 a", "DPM2 a", "Karras"),
        ("DDIM", "DDIM", "DDIM"),
        ("PLMS", "PLMS", "DDIM"),
        # names that included the schedule before A1111 1.9
        ("DPM++ 2M Karras", "DPM++ 2M", "Karras"),
        ("DPM++ 2M SDE Exponential", "DPM++ 2M SDE", "Exponential"),
        ("DPM++ 2M SDE Heun Karras", "DPM++ 2M SDE Heun", "Karras"),
        ("DPM++ 2S a Karras", "DPM++ 2S a", "Karras"),
        ("LMS Karras", "LMS", "Karras"),
        ("DPM2 a Karras", "DPM2 a", "Karras"),
        ("Euler SGM Uniform", "Euler", "SGM Uniform"),
        # A1111's k_ aliases
        ("k_euler_a", "Euler a", "Uniform"),
        ("k_euler_ancestral", "Euler a", "Uniform"),
        ("k_lms_ka", "LMS", "Karras"),
        ("k_dpm_2_a_ka", "DPM2 a", "Karras"),
        ("k_dpmpp_2m_ka", "DPM++ 2M", "Karras"),
        ("k_dpmpp_2s_a_ka", "DPM++ 2S a", "Karras"),
        ("k_dpmpp_2m_sde_exp", "DPM++ 2M SDE", "Exponential"),
        ("k_dpmpp_2m_sde_heun_ka", "DPM++ 2M SDE Heun", "Karras"),
        # ComfyUI's names
        ("dpmpp_2m", "DPM++ 2M", "Karras"),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE", "Exponential"),
        ("dpmpp_2s_ancestral", "DPM++ 2S a", "Karras"),
        ("dpm_2", "DPM2", "Karras"),
        ("dpm_2_ancestral", "DPM2 a", "Karras"),
        ("euler_ancestral", "Euler a", "Uniform"),
        ("uni_pc", "UniPC", "SGM Uniform"),
        ("deis", "DEIS", "Uniform"),
        ("ddpm", "DDPM", "Uniform"),
        ("lcm", "LCM", "SGM Uniform"),
        # variations in case and spaces
        ("euler A", "Euler a", "Uniform"),
        ("  dpm++ 2m  karras ", "DPM++ 2M", "Karras"),
        ("unipc", "UniPC", "SGM Uniform"),
    ],
)
def test_common_names_are_recognised(typed, sampler, spacing):
    info, found = find(typed)

    assert (info.name, found) == (sampler, spacing)


def test_the_schedule_argument_is_used_unless_automatic_or_part_of_the_name():
    assert find("Euler", "karras")[1] == "Karras"
    assert find("DPM++ 2M", "Automatic")[1] == find("DPM++ 2M", "automatic")[1] == "Karras"
    assert find("DPM++ 2M Karras", "Exponential")[1] == "Karras"


def test_no_two_samplers_share_a_name():
    lower_names = [name.lower() for info in SAMPLERS for name in (info.name, *info.aliases)]

    assert len(set(lower_names)) == len(lower_names)
    assert all(find(info.name)[0] is info for info in SAMPLERS)


def test_an_unknown_name_gives_suggestions():
    with pytest.raises(RequestError, match=r"sampler: 'Euller b' is not known; did you mean .*'Euler'"):
        find("Euller b")
    with pytest.raises(RequestError, match="schedule: 'quadratic'"):
        find("Euler", "quadratic")


def test_knobs_are_the_additional_parameters_of_the_function():
    assert find("DDIM")[0].knobs == ("eta", "s_noise")
    assert find("Euler")[0].knobs == ("s_churn", "s_tmin", "s_tmax", "s_noise")
    assert find("DPM++ 2M")[0].knobs == ()


@pytest.mark.parametrize("name", ["DPM2", "DPM2 a", "DPM++ 3M SDE"])
def test_the_penultimate_of_one_more_level_is_discarded(name):
    info, _ = find(name)

    sigmas = plan(info, "Karras", SCHEDULE, 9)

    whole = plan(find("Euler")[0], "Karras", SCHEDULE, 10)
    assert torch.equal(sigmas, torch.cat([whole[:-2], whole[-1:]]))


@pytest.mark.parametrize("name", ["DDIM", "PLMS", "UniPC"])
def test_the_lowest_level_is_not_used_twice(name):
    info, default = find(name)

    assert float(plan(info, default, SCHEDULE, 20)[-1]) == SCHEDULE.sigma_min
    assert plan(info, "Karras", SCHEDULE, 20)[-2:].tolist() == [SCHEDULE.sigma_min, 0]


def test_unipc_timesteps_are_even_from_last_to_first_as_in_a1111():
    times = SCHEDULE.t(plan(*find("UniPC"), SCHEDULE, 9))

    torch.testing.assert_close(times, torch.linspace(999, 0, 10), rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(RequestError, match=str(steps)):
        plan(*find("Euler"), SCHEDULE, steps)


def test_the_initial_noise_has_the_scale_of_the_samplers_paper():
    sigmas, unit = plan(*find("DDIM"), SCHEDULE, 20), torch.ones(1, 1, 1, 1)

    assert float(start(find("DDIM")[0], unit, sigmas)) == pytest.approx(math.sqrt(1 + float(sigmas[0]) ** 2))
    assert float(start(find("Euler")[0], unit, sigmas)) == float(sigmas[0])


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("spacing", [spacing.name for spacing in SPACINGS])
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_runs_with_every_spacing_and_number_of_steps(name, spacing, steps):
    info, _ = find(name)
    for schedule in (SCHEDULE, ZERO_SNR):
        sigmas, noise, reported = plan(info, spacing, schedule, steps), Noise([1, 2], SHAPE), []

        x = info.function(mixture, start(info, noise.start(), sigmas), sigmas, noise=noise, on_step=reported.append)

        assert bool(finish(x, sigmas).isfinite().all())
        assert [step.index for step in reported] == list(range(steps))


@pytest.mark.parametrize("name", NAMES)
def test_one_step_to_zero_returns_the_denoisers_x0(name):
    info, _ = find(name)
    sigmas, x = torch.tensor([9.0, 0.0]), 9 * Noise([1], SHAPE).start()

    end = info.function(mixture, x, sigmas, noise=Noise([1], SHAPE))

    torch.testing.assert_close(end, mixture(x, sigmas[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_single_images_bit_for_bit(name):
    info, spacing = find(name)
    sigmas = plan(info, spacing, SCHEDULE, 5)

    def run(seeds: list[int]) -> torch.Tensor:
        noise = Noise(seeds, SHAPE)
        return info.function(mixture, start(info, noise.start(), sigmas), sigmas, noise=noise)

    assert torch.equal(run([7, 8, 9]), torch.cat([run([seed]) for seed in (7, 8, 9)]))


@pytest.mark.parametrize("name", NAMES)
def test_uses_noise_is_true_exactly_for_samplers_that_depend_on_noise(name):
    info, spacing = find(name)
    sigmas = plan(info, spacing, SCHEDULE, 5)
    x = start(info, Noise([1], SHAPE).start(), sigmas)

    ends = [info.function(mixture, x, sigmas, noise=Noise([seed], SHAPE)) for seed in (1, 2)]

    assert torch.equal(*ends) != info.uses_noise


def test_on_step_receives_every_step():
    info, spacing = find("DPM++ 2M")
    sigmas, steps = plan(info, spacing, SCHEDULE, 4), list[Step]()
    noise = Noise([1], SHAPE)

    x = info.function(mixture, start(info, noise.start(), sigmas), sigmas, noise=noise, on_step=steps.append)

    assert [(step.index, step.count, step.sigma) for step in steps] == [(i, 4, float(sigmas[i])) for i in range(4)]
    assert torch.equal(steps[-1].x, x)
