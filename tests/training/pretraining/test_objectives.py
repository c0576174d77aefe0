"""Objectives of pretraining against closed forms: the latents' scale, the adversary's weight, the contrast."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, VaeSpec, VisionSpec
from gouache.nn.vae import Autoencoder
from gouache.training.autoencoder import Pictures, Reconstruction
from gouache.training.batch import Batch
from gouache.training.contrastive import Temperature
from gouache.training.objective import step_generator
from gouache.training.pretraining.adversary import Adversary, Discriminator, adaptive_weight
from gouache.training.pretraining.features import RandomFeatures
from gouache.training.pretraining.latent_scale import deviation, scaled
from gouache.training.pretraining.objectives import AutoencoderObjective, TextObjective


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def vae() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(VaeSpec(channels=32, channel_mult=(1, 1, 1, 1), res_blocks=1))


@torch.no_grad()
def test_the_scale_of_latents_changes_and_reconstructions_do_not(vae: Autoencoder):
    pictures = torch.rand(4, 3, 32, 32, generator=generator()) * 2 - 1
    before, reconstruction = vae.encode(pictures), vae.decode(vae.encode(pictures).mean)
    measured = deviation(vae, [pictures[:2], pictures[2:]])
    samples = torch.cat([before.sample(torch.randn(before.mean.shape, generator=generator(n))) for n in range(400)])
    assert measured == pytest.approx(float(samples.std()), rel=0.02)

    factor = 1 / (0.18215 * measured)
    vae.load_state_dict(scaled(vae.state_dict(), factor))
    assert 0.18215 * deviation(vae, [pictures]) == pytest.approx(1, rel=1e-4)
    after = vae.encode(pictures)
    torch.testing.assert_close(after.mean, factor * before.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.logvar, before.logvar + 2 * math.log(factor), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(after.mean), reconstruction, rtol=1e-4, atol=1e-5)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, fooling = (3 * last).sum(), (last * torch.tensor([0.0, 4.0])).sum()
    assert float(adaptive_weight(loss, fooling, last)) == pytest.approx(math.sqrt(18) / (4 + 1e-4))


def test_each_player_learns_from_its_own_terms_alone(vae: Autoencoder):
    torch.manual_seed(1)
    adversary = Adversary(Discriminator(8), weight=0.5, start=2)
    objective = AutoencoderObjective(Reconstruction(vae, 0), RandomFeatures(), 0.1, adversary)
    batch = Batch(torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1)
    assert "discriminator" not in objective.losses(batch, 1)
    terms = objective.losses(batch, 2)
    terms["loss"].backward()
    real = adversary.discriminator(batch.latents)
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())
    # The discriminator's gradient is that of its hinge loss on the pictures and the detached reconstructions.
    with torch.no_grad():
        fake_pictures, _ = objective.reconstruction.decoded(Pictures(batch.latents), step_generator(0, 2))
    fake = adversary.discriminator(fake_pictures)
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    for name, parameter in adversary.discriminator.named_parameters():
        (expected,) = torch.autograd.grad(hinge, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_contrast_counts_equal_captions_as_right():
    torch.manual_seed(2)
    text = ClipText(TextSpec(width=64, layers=1, heads=1, mlp_width=64))
    vision = ClipVision(
        VisionSpec(width=64, layers=1, heads=1, mlp_width=64, image_size=32, patch_size=16, projection=64)
    )
    end = text.spec.vocabulary - 1

    def tokenize(captions):
        return torch.tensor([[end - 1, 320 + len(each), end, *[end] * 74] for each in captions])

    objective = TextObjective(text, vision, Temperature(), tokenize)
    pictures = torch.rand(3, 3, 32, 32, generator=generator()) * 2 - 1
    captions = ("a", "bb", "a")
    losses = objective.losses(Batch(pictures, captions=captions), 0)

    with torch.no_grad():
        texts, images = objective._features(Batch(pictures, captions=captions))
        logits = math.exp(math.log(1 / 0.07)) * texts @ images.T
        rows, columns = logits.log_softmax(1), logits.log_softmax(0)
        # "a" is right for the first and the third picture, half each.
        by_text = -(rows[0, 0] + rows[0, 2] + rows[2, 0] + rows[2, 2]) / 2 - rows[1, 1]
        by_picture = -(columns[0, 0] + columns[2, 0] + columns[0, 2] + columns[2, 2]) / 2 - columns[1, 1]
    assert losses["loss"].item() == pytest.approx(float(by_text + by_picture) / 6, rel=1e-4)


def test_the_distance_of_features_is_a_distance():
    features, pictures = RandomFeatures(), torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    blurred = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4.0)
    shifted = pictures + 0.01
    assert float(features.distance(pictures, pictures)) == 0
    assert 0 < float(features.distance(pictures, shifted)) < float(features.distance(pictures, blurred)) < 2
