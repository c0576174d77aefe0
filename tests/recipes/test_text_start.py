"""Where the text tower of `mini` starts: a caption of one thing lies on its canvas before anything is learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec
from recipes.mini import text_start
from recipes.mini.canvas import END, FIRST, Canvas
from recipes.mini.names import COLOURS, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import Background, Placed, Scene
from recipes.mini.text_start import MIDDLE, Table

SPEC = TextSpec(width=128, layers=3, heads=2, mlp_width=768)
BEGIN, STOP, THE, OF = 49406, 49407, 5, 6
THINGS = 120


def words(thing: int) -> str:
    """Every third is called by two words, of which the second stands in many names."""
    return f"n{thing} s{thing % 7}" if thing % 3 == 0 else f"n{thing}"


def tokens(text: str) -> list[int]:
    kinds = {"n": 1000, "s": 3000, "c": 4000}
    return [kinds[word[0]] + int(word[1:]) for word in text.split()]


@pytest.fixture(scope="module")
def table() -> Table:
    """Things out of twenty patterns of patches."""
    chances = torch.Generator().manual_seed(0)
    fields = F.interpolate(torch.randn(20, 5, 4, 4, generator=chances), size=(16, 16), mode="nearest").flatten(1)
    drawn = (0.3 * torch.randn(THINGS, 20, generator=chances) @ fields).unflatten(1, (5, 16, 16))
    return Table(drawn, torch.randn(len(COLOURS), 4, generator=chances))


@pytest.fixture(scope="module")
def built(table: Table) -> tuple[ClipText, Canvas]:
    torch.manual_seed(0)
    text, canvas = ClipText(SPEC), Canvas(SPEC.width)
    names = {words(thing): thing for thing in range(THINGS)}
    colours = {word: number for number, colour in enumerate(COLOURS) for word in colour.words}

    def split(word: str) -> list[int]:
        return [4000 + colours[word]] if word in colours else tokens(word)

    met = [THE, OF, BEGIN, STOP, *(token for name in names for token in tokens(name)), *range(4000, 4012)]
    text_start.prepare(text, canvas, table, names, split, {THE, OF}, met)
    return text, canvas


def caption(*parts: int) -> Tensor:
    said = [BEGIN, *parts, STOP]
    return torch.tensor([said + [STOP] * (77 - len(said))])


@torch.no_grad()
def drawn(built: tuple[ClipText, Canvas], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(16 patches, 80) of things and cover, and (16, 4) of the ground."""
    text, canvas = built
    told = canvas.draw(text(tokens).last[0, FIRST:END])
    return told[:, :80], told[:, 80:]


def patches(drawn: Tensor) -> Tensor:
    return drawn.unflatten(1, (4, 4)).unflatten(3, (4, 4)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def test_a_name_alone_draws_its_thing_whatever_stands_around_it(built: tuple[ClipText, Canvas], table: Table):
    others = torch.stack([patches(drawn) for drawn in table.drawn])
    for thing in range(0, THINGS, 11):
        wanted = others[thing]
        spread = (wanted - patches(table.drawn.mean(0))).pow(2).sum()
        for said in (caption(*tokens(words(thing))), caption(THE, *tokens(words(thing)), OF, THE, OF)):
            found, _ = drawn(built, said)
            assert (found - wanted).pow(2).sum() < 0.05 * spread
            assert (found - others).pow(2).sum((1, 2)).argmin() == thing


def test_a_colour_is_the_grounds(built: tuple[ClipText, Canvas], table: Table):
    usual = table.grounds.mean(0)
    for colour in range(0, len(COLOURS), 3):
        _, ground = drawn(built, caption(4000 + colour, THE, 1001))
        assert (ground.mean(0) - table.grounds[colour]).norm() < 0.15 * (table.grounds[colour] - usual).norm()


def test_each_patch_says_its_place_and_no_other_token_does(built: tuple[ClipText, Canvas]):
    text, canvas = built

    with torch.no_grad():
        assert canvas.misplaced(text(caption(THE, 1001)).last) < 1e-3


def test_words_that_no_caption_holds_stay_without_a_vector(built: tuple[ClipText, Canvas]):
    table = built[0].text_model.embeddings.token_embedding.weight

    assert not table[40_000].any()
    assert table[1001].any()


def test_what_was_built_stays_while_the_rest_learns(table: Table):
    torch.manual_seed(0)
    text, canvas = ClipText(SPEC), Canvas(SPEC.width)
    names = {f"n{thing}": thing for thing in range(THINGS)}
    text_start.prepare(text, canvas, table, names, lambda word: tokens(word) if word[0] == "n" else [], set(), [THE])
    text_start.hold(text, canvas)

    canvas(text(caption(THE, 1001)).last).pow(2).mean().backward()

    first, second, third = text.text_model.encoder.layers
    assert first.self_attn.v_proj.weight.grad is None
    assert canvas.draw.weight.grad is None
    for layer in (first, second):
        assert not layer.mlp.fc1.weight.grad[:512].any()
        assert not layer.mlp.fc2.weight.grad[:, :512].any()
        assert layer.mlp.fc2.weight.grad[:, 512:].any()
    assert third.mlp.fc2.weight.grad.any()


def test_a_table_is_the_picture_taken_apart(glyphs: Glyphs):
    things = load_things()[:80:9]

    def encode(images: Tensor) -> Tensor:
        cells = F.avg_pool2d(images, 8)
        return torch.cat([cells, cells.mean(1, keepdim=True)], 1)

    table = text_start.look(things, glyphs, encode)

    for number, thing in enumerate(things):
        scene = Scene((Placed(thing, 0.5, 0.5, MIDDLE),), Background(COLOURS[4], COLOURS[4]))
        pixels = torch.tensor(np.asarray(render(scene, glyphs)).copy())
        picture = encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        drawn, ground = table.drawn[number], table.grounds[4]
        assert (drawn[:4] + (1 - drawn[4:]) * ground[:, None, None] - picture).abs().max() < 0.03


def test_the_spec_of_the_recipe_is_one_that_can_be_built():
    from recipes.mini.train import TEXT

    assert replace(TEXT, layers=3, projection=None) == SPEC
