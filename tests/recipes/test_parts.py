"""A network's weights out of a bundled file: what trained, whatever was done to it for others' sake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gouache
from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.files.write import write_safetensors
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from gouache.training.contrastive import Contrast
from recipes.mini import start, train
from recipes.mini.batches import SIZE, Scenes
from recipes.mini.bundle import describe, named
from recipes.mini.canvas import END, Canvas, Laid, Telling
from recipes.mini.dataset import VALIDATION_SEED, sample
from recipes.mini.parts import LIFT, lifted, part_of
from recipes.mini.rendering import Glyphs
from recipes.mini.scenes import FIRST_STAGE, settled
from recipes.mini.train import put

EMBEDDED = Path(gouache.__file__).parent / "embedded" / "mini.safetensors"
PLAIN = replace(FIRST_STAGE, counts=(1.0, 0.0, 0.0), small=0.0, large=0.0, graded=0.0)


@pytest.fixture(scope="module")
def networks() -> tuple[ClipText, UNet]:
    torch.manual_seed(0)
    text = ClipText(TextSpec(width=64, layers=1, heads=1, mlp_width=64, vocabulary=100))
    return text, UNet(UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0), context_dim=64))


@torch.no_grad()
def test_lifting_the_context_changes_nothing_that_the_unet_says(networks: tuple[ClipText, UNet]) -> None:
    text, unet = networks
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randint(100, (2, 77))
    plain = {name: dict(net.state_dict()) for name, net in zip(("text", "unet"), networks)}
    plain = {name: {key: value.clone() for key, value in weights.items()} for name, weights in plain.items()}
    before, said = text(tokens).last, unet(x, t, text(tokens).last)

    for name, network in zip(("text", "unet"), networks):
        network.load_state_dict(lifted(name, plain[name], by=0.1))
    after = text(tokens).last
    again = unet(x, t, after)
    for name, network in zip(("text", "unet"), networks):
        network.load_state_dict(plain[name])

    torch.testing.assert_close(after, before + 0.1)
    torch.testing.assert_close(again, said, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_comes_out_of_a_bundled_file_is_what_was_trained(tmp_path: Path, networks: tuple[ClipText, UNet]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, network in zip(("text", "unet"), networks):
        tensors |= named(name, lifted(name, network.state_dict(), LIFT))
    write_safetensors(tmp_path / "model.safetensors", tensors, describe())
    file = open_model(tmp_path / "model.safetensors")

    for name, network in zip(("text", "unet"), networks):
        back, trained = part_of(file, name), network.state_dict()
        assert back.keys() == trained.keys()
        for key, value in trained.items():
            torch.testing.assert_close(back[key], value, atol=2e-4, rtol=2**-10, msg=key)  # of float16


def test_a_file_without_the_lift_is_read_as_it_is(tmp_path: Path, networks: tuple[ClipText, UNet]) -> None:
    tensors = named("text", networks[0].state_dict())
    write_safetensors(tmp_path / "model.safetensors", tensors, {})

    back = part_of(open_model(tmp_path / "model.safetensors"), "text")

    bias = "text_model.final_layer_norm.bias"
    assert torch.equal(back[bias], networks[0].state_dict()[bias])


@torch.no_grad()
def test_the_canvas_that_is_kept_reads_the_embedded_models_text_tower(glyphs: Glyphs) -> None:
    scenes, begin = Scenes(), train.begun(EMBEDDED, train.CANVAS)
    text, canvas = train.trained_text(Path("nowhere"), begin), Canvas(train.TEXT.width)
    put(canvas, begin("canvas"))
    drawn = [sample(VALIDATION_SEED, number, scenes.things, PLAIN) for number in range(64)]
    images, captions = scenes.drawn((replace(each, scene=settled(each.scene)) for each in drawn), SIZE)
    wanted = start.latents(images, scenes.colours()) * start.LATENT_SCALE

    told = canvas(text(scenes.tokens(captions, END)).last)

    # A caption finds its picture: what is told lies nearer to it than to any other.
    apart = (told[:, None, :3] - wanted[None, :, :3]).pow(2).mean((2, 3, 4))
    assert (apart.argmin(1) == torch.arange(64)).float().mean() > 0.8


@torch.no_grad()
def test_errors_of_the_canvas_count_as_they_are_told_to() -> None:
    torch.manual_seed(0)
    text, canvas = ClipText(TextSpec(width=32, layers=1, heads=1, mlp_width=32, vocabulary=100)), Canvas(32)
    batch = Laid(torch.randint(100, (3, END)), torch.randn(3, 4, 16, 16))
    told = canvas(text(batch.tokens).last)

    for counts in (torch.ones(4), torch.tensor([4.0, 0, 0, 0]), torch.tensor([1.0, 2.0, 0.5, 0.5])):
        loss = Telling(Contrast(text, cast(Any, None)), canvas, counts).losses(batch, 0)["canvas"]
        each = torch.stack([F.mse_loss(told[:, channel], batch.latents[:, channel]) for channel in range(4)])
        torch.testing.assert_close(loss, (counts @ each) / 4)


def test_weights_of_other_names_are_refused():
    layer = nn.Linear(2, 2)
    put(layer, {"weight": torch.ones(2, 2)}, may_lack=("bias",))

    assert torch.equal(layer.weight, torch.ones(2, 2))
    for wrong in ({"weight": torch.ones(2, 2)}, {**layer.state_dict(), "scale": torch.ones(1)}):
        with pytest.raises(RequestError, match=r"start: is a file of another recipe: (bias|scale) is"):
            put(layer, wrong)


def test_a_file_of_an_older_recipe_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    begin = ["text", "--folder", str(tmp_path), "--start", str(tmp_path / "old.safetensors")]
    old = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    write_safetensors(tmp_path / "old.safetensors", {old: torch.ones(3, 128)}, {})

    assert train.main(begin) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: start: is a file of another recipe: text_model.embeddings.token_embedding.weight is (3, 128) there,"
        " (49408, 128) here"
    ]
