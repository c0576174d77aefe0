"""The autoencoder's start: that its encoder is the closed form it is said to be, and its decoder nearly its inverse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gouache.nn.spec import VaeSpec
from gouache.nn.vae import Autoencoder
from gouache.training.autoencoder import psnr
from recipes.mini import start


def smooth_pictures(count: int, size: int = 64) -> torch.Tensor:
    """Pictures that change slowly: what a blur keeps."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return smooth_pictures(16)


@pytest.fixture(scope="module")
def colours(pictures: torch.Tensor) -> start.Colours:
    return start.measure(pictures)


@pytest.fixture(scope="module")
def vae(colours: start.Colours) -> Autoencoder:
    torch.manual_seed(0)
    vae = Autoencoder(VaeSpec(channels=64, channel_mult=(1, 1, 1, 1)))
    start.prepare(vae, colours)
    return vae.eval()


@torch.no_grad()
def test_the_encoder_gives_the_closed_form(vae: Autoencoder, colours: start.Colours, pictures: torch.Tensor) -> None:
    said = vae.encode(pictures).mean

    expected = start.latents(pictures, colours)

    assert (said - expected).abs().max() < 0.02 * expected.std()


def test_cells_have_unit_variance_and_no_correlation_once_scaled(
    colours: start.Colours, pictures: torch.Tensor
) -> None:
    latents = start.latents(pictures, colours) * start.LATENT_SCALE

    spread = torch.cov(latents.permute(1, 0, 2, 3).flatten(1))

    torch.testing.assert_close(spread.diagonal(), torch.ones(4), atol=0.02, rtol=0)
    assert (spread[:3, :3] - torch.eye(3)).abs().max() < 0.02


def test_a_latent_counts_as_the_root_of_what_it_changes_in_the_picture(colours: start.Colours) -> None:
    plain = torch.zeros(1, 3, 16, 16)
    colour = torch.linalg.inv(colours.whiten).T[:, :, None, None].expand(3, 3, 16, 16)
    halves = torch.tensor([0.5, -0.5]).repeat_interleave(4).repeat(2).expand(1, 3, 16, 16) / colours.across
    changed = plain + torch.cat([colour, halves])

    moved = (start.latents(changed, colours) - start.latents(plain, colours)) * start.LATENT_SCALE
    seen = (changed - plain).pow(2).mean((1, 2, 3)).sqrt()

    torch.testing.assert_close(moved.mean((2, 3)), torch.eye(4), atol=1e-4, rtol=0)  # a unit of one latent each
    torch.testing.assert_close(start.shown(colours), 4 * seen / seen.sum(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_round_trip_blurs_as_interpolating_between_cells_does(vae: Autoencoder, pictures: torch.Tensor) -> None:
    blurred = F.interpolate(F.avg_pool2d(pictures, 8), scale_factor=8, mode="bilinear", align_corners=False)

    back = vae.decode(vae.encode(pictures).mean)

    inside = (..., slice(16, -16), slice(16, -16))  # zero padding darkens the frame; that is learnt away
    quality, expected = psnr(back[inside], pictures[inside]), psnr(blurred[inside], pictures[inside])
    assert (quality > expected - 3).all()


@torch.no_grad()
def test_a_plain_picture_keeps_its_colour(vae: Autoencoder) -> None:
    plain = torch.tensor([0.7, -0.4, 0.1])[None, :, None, None].expand(1, 3, 64, 64)

    back = vae.decode(vae.encode(plain).mean)

    # Away from the frame, where zero padding darkens.
    torch.testing.assert_close(back[..., 16:-16, 16:-16].mean((2, 3)), plain.mean((2, 3)), atol=0.03, rtol=0)


def test_groups_hold_every_trained_parameter_once(vae: Autoencoder) -> None:
    groups = start.groups(vae, encoder=True)

    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(f"vae.{name}" for name, _ in vae.named_parameters())


def test_without_the_encoder_only_the_decoder_is_trained(vae: Autoencoder) -> None:
    names = {name for group in start.groups(vae, encoder=False) for name in group.parameters}

    assert names and all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in names)
