"""A network's weights from a bundled file equal the trained ones; files of other recipes are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

import gouache
from gouache.files.open import open_model
from gouache.files.write import write_safetensors
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from gouache.training.contrastive import Contrast
from recipes.mini import init_vae, stages, train
from recipes.mini.batches import SIZE, SceneData
from recipes.mini.bundle import file_tensors, metadata
from recipes.mini.dataset import VALIDATION_SEED, sample
from recipes.mini.layout_tokens import END, CaptionedLatents, LayoutHead, LayoutObjective
from recipes.mini.rendering import Glyphs
from recipes.mini.scenes import UNIFORM, without_jitter
from recipes.mini.weights import CONTEXT_SHIFT, network_weights, shift_context
from tests.recipes.subset import FONT, THINGS

EMBEDDED = Path(gouache.__file__).parent / "embedded" / "mini.safetensors"
PLAIN = replace(UNIFORM, count_weights=(1.0, 0.0, 0.0), small=0.0, large=0.0, gradients=0.0)


@pytest.fixture(scope="module")
def networks() -> tuple[ClipText, UNet]:
    torch.manual_seed(0)
    text = ClipText(TextSpec(width=64, layers=1, heads=1, mlp_width=64, vocabulary=100))
    return text, UNet(UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0), context_dim=64))


@torch.no_grad()
def test_a_shift_of_the_context_does_not_change_the_unets_output(networks: tuple[ClipText, UNet]) -> None:
    text, unet = networks
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randint(100, (2, 77))
    original = {name: dict(net.state_dict()) for name, net in zip(("text", "unet"), networks)}
    original = {name: {key: value.clone() for key, value in weights.items()} for name, weights in original.items()}
    context, output = text(tokens).last, unet(x, t, text(tokens).last)

    for name, network in zip(("text", "unet"), networks):
        network.load_state_dict(shift_context(name, original[name], by=0.1))
    shifted = text(tokens).last
    shifted_output = unet(x, t, shifted)
    for name, network in zip(("text", "unet"), networks):
        network.load_state_dict(original[name])

    torch.testing.assert_close(shifted, context + 0.1)
    torch.testing.assert_close(shifted_output, output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_from_a_bundled_file_are_the_trained_ones(tmp_path: Path, networks: tuple[ClipText, UNet]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, network in zip(("text", "unet"), networks):
        tensors |= file_tensors(name, shift_context(name, network.state_dict(), CONTEXT_SHIFT))
    write_safetensors(tmp_path / "model.safetensors", tensors, metadata())
    file = open_model(tmp_path / "model.safetensors")

    for name, network in zip(("text", "unet"), networks):
        found, trained = network_weights(file, name), network.state_dict()
        assert found.keys() == trained.keys()
        for key, value in trained.items():
            torch.testing.assert_close(found[key], value, atol=2e-4, rtol=2**-10, msg=key)  # of float16


def test_a_file_without_the_shift_is_read_unchanged(tmp_path: Path, networks: tuple[ClipText, UNet]) -> None:
    tensors = file_tensors("text", networks[0].state_dict())
    write_safetensors(tmp_path / "model.safetensors", tensors, {})

    found = network_weights(open_model(tmp_path / "model.safetensors"), "text")

    bias = "text_model.final_layer_norm.bias"
    assert torch.equal(found[bias], networks[0].state_dict()[bias])


@torch.no_grad()
def test_the_stored_layout_head_decodes_the_embedded_models_text_encoder(glyphs: Glyphs) -> None:
    data, text, layout = SceneData(THINGS, glyphs), ClipText(stages.TEXT), LayoutHead(stages.TEXT.width)
    text.load_state_dict(network_weights(open_model(EMBEDDED), "text"))
    layout.load_state_dict(network_weights(open_model(train.LAYOUT), "layout"))
    # All of different things, since a caption need not state the background.
    samples = [sample(VALIDATION_SEED, number, (thing,), PLAIN) for number, thing in enumerate(THINGS)]
    images, captions = data.render((replace(each, scene=without_jitter(each.scene)) for each in samples), SIZE)
    latents = init_vae.latents(images, data.colour_statistics(500)) * init_vae.LATENT_SCALE

    decoded = layout(text(data.tokens(captions, END)).last)

    # The decoded picture of a caption is nearer to its own picture than to any other.
    distances = (decoded[:, None, :3] - latents[None, :, :3]).pow(2).mean((2, 3, 4))
    accuracy = (distances.argmin(1) == torch.arange(len(THINGS))).float().mean()
    assert accuracy > 0.7


@torch.no_grad()
def test_channel_weights_scale_the_layout_errors() -> None:
    torch.manual_seed(0)
    text, layout = ClipText(TextSpec(width=32, layers=1, heads=1, mlp_width=32, vocabulary=100)), LayoutHead(32)
    batch = CaptionedLatents(torch.randint(100, (3, END)), torch.randn(3, 4, 16, 16))
    decoded = layout(text(batch.tokens).last)

    for weights in (torch.ones(4), torch.tensor([4.0, 0, 0, 0]), torch.tensor([1.0, 2.0, 0.5, 0.5])):
        loss = LayoutObjective(Contrast(text, cast(Any, None)), layout, weights).losses(batch, 0)["layout"]
        errors = torch.stack([F.mse_loss(decoded[:, channel], batch.latents[:, channel]) for channel in range(4)])
        torch.testing.assert_close(loss, (weights @ errors) / 4)


def test_a_file_of_an_older_recipe_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--folder", str(tmp_path), "--start", str(tmp_path / "old.safetensors"), "--font", str(FONT)]
    old = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    write_safetensors(tmp_path / "old.safetensors", {old: torch.ones(3, 128)}, {})

    assert train.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: start: the file does not fit this recipe: cond_stage_model.transformer.text_model.embeddings."
        "token_embedding.weight is (3, 128) there, (49408, 128) here; use "
    )
