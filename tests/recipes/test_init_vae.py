"""The autoencoder's initial weights: the encoder equals its closed form, and the decoder is nearly its inverse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gouache.nn.spec import VaeSpec
from gouache.nn.vae import Autoencoder
from gouache.training.autoencoder import psnr
from recipes.mini import init_vae


def smooth_pictures(count: int, size: int = 64) -> torch.Tensor:
    """Pictures without fine detail, which a blur preserves."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return smooth_pictures(16)


@pytest.fixture(scope="module")
def colours(pictures: torch.Tensor) -> init_vae.ColourStatistics:
    return init_vae.measure(pictures)


@pytest.fixture(scope="module")
def vae(colours: init_vae.ColourStatistics) -> Autoencoder:
    torch.manual_seed(0)
    vae = Autoencoder(VaeSpec(channels=64, channel_mult=(1, 1, 1, 1)))
    init_vae.initialise(vae, colours)
    return vae.eval()


@torch.no_grad()
def test_the_encoder_equals_its_closed_form(
    vae: Autoencoder, colours: init_vae.ColourStatistics, pictures: torch.Tensor
) -> None:
    found = vae.encode(pictures).mean

    expected = init_vae.latents(pictures, colours)

    assert (found - expected).abs().max() < 0.02 * expected.std()


def test_scaled_latents_have_unit_variance_and_no_correlation(
    colours: init_vae.ColourStatistics, pictures: torch.Tensor
) -> None:
    latents = init_vae.latents(pictures, colours) * init_vae.LATENT_SCALE

    covariance = torch.cov(latents.permute(1, 0, 2, 3).flatten(1))

    torch.testing.assert_close(covariance.diagonal(), torch.ones(4), atol=0.02, rtol=0)
    assert (covariance[:3, :3] - torch.eye(3)).abs().max() < 0.02


def test_channel_weights_are_the_rms_change_of_the_picture_per_unit_of_a_latent(
    colours: init_vae.ColourStatistics,
) -> None:
    plain = torch.zeros(1, 3, 16, 16)
    colour = torch.linalg.inv(colours.whiten).T[:, :, None, None].expand(3, 3, 16, 16)
    halves = torch.tensor([0.5, -0.5]).repeat_interleave(4).repeat(2).expand(1, 3, 16, 16) / colours.difference_scale
    changed = plain + torch.cat([colour, halves])

    change = (init_vae.latents(changed, colours) - init_vae.latents(plain, colours)) * init_vae.LATENT_SCALE
    rms = (changed - plain).pow(2).mean((1, 2, 3)).sqrt()

    torch.testing.assert_close(change.mean((2, 3)), torch.eye(4), atol=1e-4, rtol=0)  # one unit of each latent
    torch.testing.assert_close(init_vae.channel_weights(colours), 4 * rms / rms.sum(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_round_trip_equals_interpolation_between_cells(vae: Autoencoder, pictures: torch.Tensor) -> None:
    blurred = F.interpolate(F.avg_pool2d(pictures, 8), scale_factor=8, mode="bilinear", align_corners=False)

    decoded = vae.decode(vae.encode(pictures).mean)

    inside = (..., slice(16, -16), slice(16, -16))  # zero padding darkens the frame, until trained
    quality, expected = psnr(decoded[inside], pictures[inside]), psnr(blurred[inside], pictures[inside])
    assert (quality > expected - 3).all()


@torch.no_grad()
def test_a_plain_picture_keeps_its_colour(vae: Autoencoder) -> None:
    plain = torch.tensor([0.7, -0.4, 0.1])[None, :, None, None].expand(1, 3, 64, 64)

    decoded = vae.decode(vae.encode(plain).mean)

    # Without the frame, which zero padding darkens.
    torch.testing.assert_close(decoded[..., 16:-16, 16:-16].mean((2, 3)), plain.mean((2, 3)), atol=0.03, rtol=0)


def test_groups_contain_every_trained_parameter_once(vae: Autoencoder) -> None:
    groups = init_vae.groups(vae, encoder=True)

    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(f"vae.{name}" for name, _ in vae.named_parameters())


def test_without_the_encoder_only_the_decoder_is_trained(vae: Autoencoder) -> None:
    names = {name for group in init_vae.groups(vae, encoder=False) for name in group.parameters}

    assert names and all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in names)
