"""Initial weights of mini's text encoder: the layout of a caption for one thing is right before any training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec
from recipes.mini import init_text
from recipes.mini.init_text import MEDIUM, AppearanceTable
from recipes.mini.layout_tokens import END, FIRST, LayoutHead
from recipes.mini.names import COLOURS
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import Background, PlacedThing, Scene
from tests.recipes.subset import THINGS

SPEC = TextSpec(width=128, layers=3, heads=2, mlp_width=768)
BEGIN, STOP, THE, OF = 49406, 49407, 5, 6
COUNT = 120  # things


def name(thing: int) -> str:
    """Every third name has two words, of which the second occurs in many names."""
    return f"n{thing} s{thing % 7}" if thing % 3 == 0 else f"n{thing}"


def tokenize(text: str) -> list[int]:
    first = {"n": 1000, "s": 3000, "c": 4000}
    return [first[word[0]] + int(word[1:]) for word in text.split()]


@pytest.fixture(scope="module")
def table() -> AppearanceTable:
    """Things composed of twenty random patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(20, 5, 4, 4, generator=generator), size=(16, 16), mode="nearest").flatten(1)
    things = (0.3 * torch.randn(COUNT, 20, generator=generator) @ patterns).unflatten(1, (5, 16, 16))
    return AppearanceTable(things, torch.randn(len(COLOURS), 4, generator=generator))


@pytest.fixture(scope="module")
def networks(table: AppearanceTable) -> tuple[ClipText, LayoutHead]:
    torch.manual_seed(0)
    text, layout = ClipText(SPEC), LayoutHead(SPEC.width)
    names = {name(thing): thing for thing in range(COUNT)}
    colours = {word: number for number, colour in enumerate(COLOURS) for word in colour.words}

    def split(word: str) -> list[int]:
        return [4000 + colours[word]] if word in colours else tokenize(word)

    used = [THE, OF, BEGIN, STOP, *(token for each in names for token in tokenize(each)), *range(4000, 4012)]
    init_text.initialise(text, layout, table, names, split, {THE, OF}, used)
    return text, layout


def caption(*words: int) -> Tensor:
    tokens = [BEGIN, *words, STOP]
    return torch.tensor([tokens + [STOP] * (77 - len(tokens))])


@torch.no_grad()
def decode(networks: tuple[ClipText, LayoutHead], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(16 patches, 80) of things and alpha, and (16, 4) of the background."""
    text, layout = networks
    decoded = layout.draw(text(tokens).last[0, FIRST:END])
    return decoded[:, :80], decoded[:, 80:]


def patches(things: Tensor) -> Tensor:
    return things.unflatten(1, (4, 4)).unflatten(3, (4, 4)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def test_a_name_draws_its_thing_whatever_words_surround_it(
    networks: tuple[ClipText, LayoutHead], table: AppearanceTable
):
    all_things = torch.stack([patches(thing) for thing in table.things])
    for thing in range(0, COUNT, 11):
        expected = all_things[thing]
        variance = (expected - patches(table.things.mean(0))).pow(2).sum()
        for tokens in (caption(*tokenize(name(thing))), caption(THE, *tokenize(name(thing)), OF, THE, OF)):
            found, _ = decode(networks, tokens)
            assert (found - expected).pow(2).sum() < 0.05 * variance
            assert (found - all_things).pow(2).sum((1, 2)).argmin() == thing


def test_a_colour_word_sets_the_background(networks: tuple[ClipText, LayoutHead], table: AppearanceTable):
    mean = table.backgrounds.mean(0)
    for colour in range(0, len(COLOURS), 3):
        _, background = decode(networks, caption(4000 + colour, THE, 1001))
        error = (background.mean(0) - table.backgrounds[colour]).norm()
        assert error < 0.15 * (table.backgrounds[colour] - mean).norm()


def test_layout_tokens_have_position_codes_and_no_other_token_has(networks: tuple[ClipText, LayoutHead]):
    text, layout = networks

    with torch.no_grad():
        assert layout.position_loss(text(caption(THE, 1001)).last) < 1e-3


def test_vectors_of_unused_tokens_are_zero(networks: tuple[ClipText, LayoutHead]):
    vectors = networks[0].text_model.embeddings.token_embedding.weight

    assert not vectors[40_000].any()
    assert vectors[1001].any()


def test_frozen_weights_get_no_gradient_and_the_others_do(table: AppearanceTable):
    torch.manual_seed(0)
    text, layout = ClipText(SPEC), LayoutHead(SPEC.width)
    names = {f"n{thing}": thing for thing in range(COUNT)}
    split = lambda word: tokenize(word) if word[0] == "n" else []  # noqa: E731
    init_text.initialise(text, layout, table, names, split, set(), [THE])
    init_text.freeze(text, layout)

    layout(text(caption(THE, 1001)).last).pow(2).mean().backward()

    first, second, third = text.text_model.encoder.layers
    assert first.self_attn.v_proj.weight.grad is None
    assert layout.draw.weight.grad is None
    for layer in (first, second):
        assert not layer.mlp.fc1.weight.grad[:512].any()
        assert not layer.mlp.fc2.weight.grad[:, :512].any()
        assert layer.mlp.fc2.weight.grad[:, 512:].any()
    assert third.mlp.fc2.weight.grad.any()


def test_the_appearance_table_composes_to_the_rendered_picture(glyphs: Glyphs):
    things = THINGS[:9]

    def encode(images: Tensor) -> Tensor:
        cells = F.avg_pool2d(images, 8)
        return torch.cat([cells, cells.mean(1, keepdim=True)], 1)

    table = init_text.measure_appearance(things, glyphs, encode)

    for number, thing in enumerate(things):
        scene = Scene((PlacedThing(thing, 0.5, 0.5, MEDIUM),), Background(COLOURS[4], COLOURS[4]))
        pixels = torch.tensor(np.asarray(render(scene, glyphs)).copy())
        picture = encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        foreground, background = table.things[number], table.backgrounds[4]
        composed = foreground[:4] + (1 - foreground[4:]) * background[:, None, None]
        assert (composed - picture).abs().max() < 0.03


def test_the_tested_spec_is_the_recipes_with_fewer_layers():
    from recipes.mini.stages import TEXT

    assert replace(TEXT, layers=3, projection=None) == SPEC
