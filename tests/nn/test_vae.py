"""The autoencoder compared with diffusers' AutoencoderKL with the same random weights, and formulas of its parts."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from gouache.layouts.diffusers import vae_rules
from gouache.layouts.rules import plan
from gouache.nn.spec import VaeSpec
from gouache.nn.vae import Autoencoder, Downsample, Moments

from .narrow import normal, scramble

SPEC = VaeSpec(channels=32, channel_mult=(1, 2, 1, 3))


@pytest.fixture(scope="module")
def pair():
    """(ours, theirs) with equal weights, renamed by the layout table."""
    from diffusers import AutoencoderKL

    widths = [SPEC.channels * mult for mult in SPEC.channel_mult]
    theirs = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=SPEC.res_blocks,
        latent_channels=SPEC.latent_channels,
    )
    scramble(theirs)
    weights = theirs.state_dict()
    ours = Autoencoder(SPEC)
    ours.load_state_dict(
        {
            name: origin.tensor(weights.__getitem__)
            for name, origin in plan(vae_rules(len(widths)), weights).origins.items()
        }
    )
    return ours.eval(), theirs


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@torch.no_grad()
def test_encoding_agrees_with_diffusers(pair, size):
    ours, theirs = pair
    image = normal(2, 3, *size).clamp(-1, 1)

    moments = ours.encode(image)

    expected = theirs.encode(image).latent_dist
    assert moments.mean.shape == (2, 4, size[0] // SPEC.factor, size[1] // SPEC.factor)
    assert expected.mean.std() > 0.1 and expected.logvar.std() > 0.1
    assert_close(moments.mean, expected.mean, atol=1e-4, rtol=1e-4)
    assert_close(moments.logvar, expected.logvar, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
@torch.no_grad()
def test_decoding_agrees_with_diffusers(pair, size):
    ours, theirs = pair
    latent = normal(2, 4, *size)

    image = ours.decode(latent)

    expected = theirs.decode(latent).sample
    assert expected.std() > 0.1
    assert_close(image, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_downsampling_pads_with_one_row_at_the_bottom_and_one_column_on_the_right_only():
    layer = Downsample(1)
    layer.conv.weight.fill_(1)
    layer.conv.bias.zero_()

    found = layer(torch.ones(1, 1, 4, 4))

    assert found.flatten().tolist() == [9, 6, 6, 4]


@torch.no_grad()
def test_the_log_variance_is_clamped_to_where_its_exponential_is_finite():
    vae = scramble(Autoencoder(VaeSpec(channels=32, channel_mult=(1,))))
    image = normal(1, 3, 8, 8)
    vae.quant_conv.bias[4:6] = 1e6
    vae.quant_conv.bias[6:] = -1e6

    moments = vae.encode(image)

    assert moments.logvar[:, :2].unique().tolist() == [20]
    assert moments.logvar[:, 2:].unique().tolist() == [-30]


def test_samples_and_divergence_of_moments_are_those_of_the_normal_distribution():
    mean, logvar, noise = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=2), normal(3, 4, 2, 2, seed=3)
    moments = Moments(mean, logvar)
    distribution = Normal(mean.double(), logvar.double().exp().sqrt())

    assert_close(distribution.cdf(moments.sample(noise).double()), Normal(0.0, 1.0).cdf(noise.double()))
    expected = kl_divergence(distribution, Normal(0.0, 1.0)).sum((1, 2, 3))
    assert_close(moments.kl().double(), expected, atol=1e-5, rtol=1e-5)
