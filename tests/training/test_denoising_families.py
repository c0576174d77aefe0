"""Losses and gradients on narrow U-Nets of each family, compared with diffusers' and with finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Prediction
from gouache.diffusion.schedule import Schedule
from gouache.layouts.diffusers import unet_rules
from gouache.layouts.rules import plan
from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.loop import train

from .toys import denoiser_factory, settings

SCHEDULE = Schedule.scaled_linear()
POOLED = 10  # channels of SDXL's pooled prompt; six numbers of 256 channels follow


@dataclass(frozen=True)
class Narrow:
    """A narrow U-Net as our spec and as diffusers' configuration, and what it predicts."""

    spec: UNetSpec
    config: dict[str, Any]
    prediction: Prediction


def narrow(**values: Any) -> UNetSpec:
    return UNetSpec(
        **{"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention_depth": (1, 0), "context_dim": 24}
        | values
    )


SD1 = {"attention_head_dim": 8, "cross_attention_dim": 24}  # for SD1, attention_head_dim is the number of heads
SD2 = {"attention_head_dim": [2, 4], "cross_attention_dim": 24, "use_linear_projection": True}
SDXL = SD2 | {
    "transformer_layers_per_block": [2, 1],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": POOLED + 6 * 256,
}
HEADS = {"heads": None, "head_channels": 16, "linear_projection": True}
FAMILIES = {
    "sd1": Narrow(narrow(), SD1, "eps"),
    "sd1-inpainting": Narrow(narrow(in_channels=9), SD1 | {"in_channels": 9}, "eps"),
    "sd2-v": Narrow(narrow(**HEADS), SD2, "v"),
    "sdxl": Narrow(
        narrow(**HEADS, attention_depth=(2, 0), middle_depth=1, vector_channels=POOLED + 6 * 256), SDXL, "eps"
    ),
}


@dataclass(frozen=True)
class Inputs:
    """A batch of three images, of which the second is trained without its prompt."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    drop: Tensor
    context: Tensor
    pooled: Tensor
    size: Tensor
    concat: Tensor


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    context, pooled = torch.randn(4, 7, 24, generator=generator), torch.randn(4, POOLED, generator=generator)
    size = torch.tensor([[1024.0, 768, 0, 64, 512, 640]] * 3 + [[0.0] * 6])
    concat = torch.randn(3, 5, 8, 8, generator=generator)
    t, drop = torch.tensor([20, 400, 950]), torch.tensor([False, True, False])
    return Inputs(latents, noise, t, drop, context, pooled, size, concat)  # row 3 is the unconditional one


def vectors(given: Inputs) -> Tensor:
    """SDXL's vector: the pooled prompt, and the sinusoidal embedding of each of the six numbers (cosines first)."""
    frequencies = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    angles = given.size[..., None] * frequencies
    return torch.cat([given.pooled, torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)], dim=1)


def batch_of(family: Narrow, given: Inputs) -> tuple[Batch, Conditioning]:
    """(batch, unconditional); the latter has no concat channels, as a caller has none to give."""
    vector = vectors(given) if family.spec.vector_channels else None
    concat = given.concat if family.spec.in_channels == 9 else None
    text = Conditioning(given.context, vector)
    rows = text.rows(slice(0, 3))
    return Batch(given.latents, Conditioning(rows.context, rows.vector, concat)), text.rows(slice(3, 4))


def objective(family: Narrow, unet: UNet, unconditional: Conditioning) -> Denoising:
    return Denoising(denoiser_factory(unet, SCHEDULE, family.prediction), {"unet": unet}, unconditional, seed=0)


@contextmanager
def without_global_random_numbers() -> Iterator[None]:
    """Fails if the global random generator is used."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))


def both(family: Narrow) -> tuple[UNet, nn.Module, dict[str, Any]]:
    """Our U-Net, diffusers' with the same weights, and how the latter's tensors become ours, by our names."""
    from diffusers import UNet2DConditionModel

    prefixes = [("CrossAttn" if depth else "") for depth in family.spec.attention_depth]
    theirs = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=family.spec.res_blocks,
        block_out_channels=[family.spec.channels * mult for mult in family.spec.channel_mult],
        down_block_types=[f"{prefix}DownBlock2D" for prefix in prefixes],
        up_block_types=[f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        **family.config,
    )
    randomise(theirs)
    weights = theirs.state_dict()
    origins = plan(unet_rules([bool(prefix) for prefix in prefixes], family.spec.res_blocks), weights).origins
    ours = UNet(family.spec)
    ours.load_state_dict({name: origin.tensor(weights.__getitem__) for name, origin in origins.items()})
    return ours, theirs, dict(origins)


def reference_loss(theirs: Any, family: Narrow, given: Inputs) -> Tensor:
    """The mean min-SNR loss written down from DDPM's definitions, without any code of ours."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[given.t].float()[:, None, None, None]
    noisy = alpha.sqrt() * given.latents + (1 - alpha).sqrt() * given.noise
    target = (
        given.noise if family.prediction == "eps" else alpha.sqrt() * given.noise - (1 - alpha).sqrt() * given.latents
    )
    rows = [3 if drop else row for row, drop in enumerate(given.drop.tolist())]
    if family.spec.in_channels == 9:
        noisy = torch.cat([noisy, given.concat], dim=1)
    added = {"text_embeds": given.pooled[rows], "time_ids": given.size[rows]} if family.spec.vector_channels else None
    output = theirs(noisy, given.t, given.context[rows], added_cond_kwargs=added).sample
    snr = (alpha / (1 - alpha)).flatten()
    weight = snr.clamp(max=5) / (snr if family.prediction == "eps" else snr + 1)
    return (weight * (output - target).pow(2).mean((1, 2, 3))).mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_all_gradients_are_those_of_diffusers(name):
    family, given = FAMILIES[name], inputs()
    ours, theirs, origins = both(family)
    batch, unconditional = batch_of(family, given)

    with without_global_random_numbers():
        loss = objective(family, ours, unconditional).loss(batch, given.t, given.noise, given.drop).mean()
        loss.backward()

    expected = reference_loss(theirs, family, given)
    expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert_close(parameter.grad, origins[key].tensor(gradients.__getitem__), rtol=1e-3, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_finite_differences(name):
    family, given = FAMILIES[name], inputs()
    unet = UNet(family.spec).double()
    randomise(unet)
    batch, unconditional = batch_of(family, given)
    batch = Batch(batch.latents.double(), batch.conditioning.to(dtype=torch.float64))
    training = objective(family, unet, unconditional.to(dtype=torch.float64))

    def loss() -> Tensor:
        return training.losses(batch, 3)["loss"]

    loss().backward()
    parameters = dict(unet.named_parameters())
    chosen = ["input_blocks.0.0.weight", "time_embed.0.weight", "out.2.bias"]
    chosen += [key for key in parameters if key.endswith(("attn2.to_k.weight", "label_emb.0.0.weight"))][:2]
    for key in chosen:
        gradient = parameters[key].grad
        assert gradient is not None
        index = int(gradient.abs().argmax())
        values = parameters[key].data.view(-1)
        middle, difference = float(values[index]), 1e-5
        with torch.no_grad():
            values[index] = middle + difference
            above = loss()
            values[index] = middle - difference
            below = loss()
            values[index] = middle
        assert float(gradient.view(-1)[index]) == pytest.approx(float(above - below) / (2 * difference), rel=1e-5), key


@pytest.mark.parametrize("name", FAMILIES)
def test_training_reduces_the_loss_of_a_fixed_batch(tmp_path, name):
    family, given = FAMILIES[name], inputs()
    unet = UNet(family.spec)
    randomise(unet)
    batch, unconditional = batch_of(family, given)
    training = objective(family, unet, unconditional)

    def loss() -> float:
        with torch.no_grad():
            return float(training.loss(batch, given.t, given.noise, given.drop).mean())

    before = loss()
    train(training, lambda _: batch, settings(steps=8, learning_rate=3e-3, ema_decay=0), tmp_path)

    assert loss() < 0.8 * before
