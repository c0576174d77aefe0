"""How the text tower starts: knowing its nouns, by sight.

What a noun looks like is known before any training: the pictures of all things, without their ground, are a table, and
their principal components a code of few numbers for each. A tower that begins with random vectors finds such a code
late, noun by noun. This one begins with it:

    embeddings   each token a share of its nouns' codes, by least squares, so that the shares of a noun's tokens add up;
                 words for colours likewise hold the ground's latents
    layer 1      attention that averages, so each token of the canvas hears the sum of what was said
    layers 1, 2  feed-forwards: units that only one patch's place opens make of the code that patch's picture

So a caption of one thing of middle size lies on the canvas at once, and the tower learns the rest: sizes, places, two
things, other colours, words of no meaning. All of it goes along directions at right angles, beside one that is the same
in all tokens and so large that the norms' divisors stand nearly still. What was built is held (`hold`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gouache.nn.clip_text import ClipText
from recipes.mini.canvas import CELLS, FIRST, PATCHES, SIDE, Canvas, codes
from recipes.mini.names import COLOURS, Thing
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import Background, Placed, Scene

MIDDLE = 0.67  # the size, as a share of the frame, that things are known in
CODE = 72  # numbers of a noun's code
SHOWN = 32  # numbers of a patch's picture
STEADY = 8.0  # the coordinate that all tokens share
NORM = 8.7  # the length of a canvas token, which the norms divide by, nearly
CODED = 0.2  # the deviation of a code's coordinates where a thing is alone, and of the picture's
OTHER = 0.3  # the same of what else tells tokens apart
GATE = 6.0  # how far a unit stands above nothing in its patch, and at least as far below in the others
RIDGE = 1e-3
LOUD = 8.0  # how much louder than an average what was said is heard; times five would be its sum


@dataclass(frozen=True)
class Table:
    """How things look: `drawn` (things, 5, 16, 16), their latents times cover, and cover; `grounds` (colours, 4)."""

    drawn: Tensor
    grounds: Tensor


def look(things: Sequence[Thing], glyphs: Glyphs, encode: Callable[[Tensor], Tensor], size: int = 128) -> Table:
    """By pictures on black and on white: what differs between them is where the ground shows."""
    named = {colour.name: colour for colour in COLOURS}

    def latents(colour: str, placed: Sequence[tuple[Placed, ...]]) -> Tensor:
        ground = Background(named[colour], named[colour])
        pixels = np.stack([np.asarray(render(Scene(each, ground), glyphs, size)) for each in placed])
        return encode(torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)

    alone = [(Placed(thing, 0.5, 0.5, MIDDLE),) for thing in things]
    white, black = latents("white", alone), latents("black", alone)
    bare_white, bare_black = latents("white", [()]), latents("black", [()])
    apart = bare_white - bare_black
    shows = ((white - black) * apart).sum(1, keepdim=True) / apart.pow(2).sum(1, keepdim=True)
    drawn = torch.cat([black - shows * bare_black, 1 - shows], 1)
    return Table(drawn, torch.cat([latents(colour.name, [()]).mean((2, 3)) for colour in COLOURS]))


@torch.no_grad()
def prepare(
    text: ClipText,
    canvas: Canvas,
    table: Table,
    words: Mapping[str, int],
    tokens: Callable[[str], Sequence[int]],
    common: set[int],
    met: Sequence[int],
) -> None:
    """Set the weights of a freshly built tower of width 128 and of what reads its canvas.

    `words` are all ways to name a thing, by its number in the table; `tokens` splits a word; `common` tokens are those
    of captions whatever they name; `met` are all that captions can hold, and the rest stays zero.
    """
    width = text.spec.width
    chances = torch.Generator().manual_seed(4)
    axes = _axes(width, chances)
    steady, place, code = axes[:1], axes[1:5], axes[5 : 5 + CODE]
    ground, shown = axes[5 + CODE : 9 + CODE], axes[9 + CODE : 9 + CODE + SHOWN]
    free = axes[9 + CODE + SHOWN :]
    other = torch.cat([shown, free])  # a word has no picture of its own

    # Codes, and pictures by patches.
    whole = table.drawn.flatten(1)
    left, scales, _ = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)
    coded = left[:, :CODE] * scales[:CODE]
    coded = coded * (CODED / coded.std())
    patches = table.drawn.unflatten(2, (SIDE, CELLS)).unflatten(4, (SIDE, CELLS)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = patches.flatten(1, 2)  # things, patches, 5 * 16
    middle = patches.mean((0, 1))
    bases = torch.linalg.svd((patches - middle).flatten(0, 1), full_matrices=False)[2][:SHOWN]
    parts = (patches - middle) @ bases.T
    loud = parts.std() / CODED
    # What a patch shows is linear in the code.
    usual, parts = parts.mean(0) / loud, (parts - parts.mean(0)) / loud
    maps = (torch.linalg.pinv(coded, rtol=1e-4) @ parts.flatten(1)).unflatten(1, (PATCHES, SHOWN))

    _embed(text, _shares(coded, words, tokens, common), table, tokens, met, (code, ground, other), chances)
    positions = text.text_model.embeddings.position_embedding.weight
    positions.copy_(CODED * torch.randn(len(positions), len(free), generator=chances) @ free)
    positions += STEADY * steady
    positions[FIRST : FIRST + PATCHES] += codes() @ place

    for layer in text.text_model.encoder.layers:
        for end in (layer.self_attn.out_proj, layer.mlp.fc2):
            end.weight.zero_()
            end.bias.zero_()
    first = text.text_model.encoder.layers[0]
    size = width**0.5 / STEADY  # what the norms multiply by, nearly
    told = torch.cat([code, ground])
    first.self_attn.q_proj.weight.zero_()
    first.self_attn.q_proj.bias.zero_()
    first.self_attn.v_proj.weight[: len(told)] = told / size
    first.self_attn.v_proj.bias.zero_()
    # The average over all tokens before it: the first patches hear all louder than the last.
    first.self_attn.out_proj.weight[:, : len(told)] = LOUD * told.T

    size = width**0.5 / NORM
    for number, layer in enumerate(list(text.text_model.encoder.layers)[:2]):
        half = slice(number * SHOWN // 2, (number + 1) * SHOWN // 2)
        into, out = layer.mlp.fc1, layer.mlp.fc2
        for patch, signs in enumerate(codes()):
            heard = (FIRST + patch + 1) / LOUD
            gate, value = GATE * (signs @ place), heard * maps[:, patch, half].T @ code
            for kind, sign in enumerate((1, -1)):  # f(GATE + x) - f(GATE - x) = 2 x where the gate is open, else 0
                rows = slice((2 * patch + kind) * SHOWN // 2, (2 * patch + kind + 1) * SHOWN // 2)
                into.weight[rows] = (gate + sign * value) / size
                into.bias[rows] = sign * usual[patch, half] - 3 * GATE
                out.weight[:, rows] = sign * shown[half].T / 2

    canvas.place.weight.copy_(place / size)
    draw = canvas.draw
    draw.weight[:-4] = loud * bases.T @ shown / size
    draw.weight[-4:] = ground * (FIRST + PATCHES / 2) / LOUD / size
    draw.bias[:-4], draw.bias[-4:] = middle, table.grounds.mean(0)


def hold(text: ClipText, canvas: Canvas) -> None:
    """Keep what was built as it is while the rest learns around it: a step that suits all would blunt it at first."""
    built = PATCHES * SHOWN
    first, second = list(text.text_model.encoder.layers)[:2]
    text.text_model.embeddings.position_embedding.requires_grad_(False)
    text.text_model.final_layer_norm.requires_grad_(False)
    canvas.requires_grad_(False)
    first.self_attn.requires_grad_(False)
    for layer in (first, second):
        layer.layer_norm1.requires_grad_(False)
        layer.layer_norm2.requires_grad_(False)
        layer.mlp.fc1.weight.register_hook(_without_rows(built))
        layer.mlp.fc1.bias.register_hook(_without_rows(built))
        layer.mlp.fc2.weight.register_hook(lambda gradient: _without_rows(built)(gradient.T).T)


def _without_rows(count: int) -> Callable[[Tensor], Tensor]:
    def cleared(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:count] = 0
        return gradient

    return cleared


def _axes(width: int, chances: torch.Generator) -> Tensor:
    """(width - 1, width): unit vectors at right angles to each other and to the mean, which the norms take off."""
    basis = torch.cat([torch.ones(width, 1), torch.randn(width, width - 1, generator=chances)], 1)
    return torch.linalg.qr(basis)[0].T[1:]


def _shares(
    coded: Tensor, words: Mapping[str, int], tokens: Callable[[str], Sequence[int]], common: set[int]
) -> dict[int, Tensor]:
    """What each token gets so that the shares of every word's tokens add up to its thing's code, nearly."""
    split = {word: [token for token in tokens(word) if token not in common] for word in words}
    used = sorted({token for parts in split.values() for token in parts})
    number = {token: index for index, token in enumerate(used)}
    counts = torch.zeros(len(words), len(used))
    for row, parts in enumerate(split.values()):
        for token in parts:
            counts[row, number[token]] += 1
    targets = coded[list(words.values())]
    products = counts.T @ counts + RIDGE * torch.eye(len(used))
    return dict(zip(used, torch.linalg.solve(products, counts.T @ targets)))


def _embed(
    text: ClipText,
    shares: Mapping[int, Tensor],
    table: Table,
    tokens: Callable[[str], Sequence[int]],
    met: Sequence[int],
    axes: tuple[Tensor, Tensor, Tensor],
    chances: torch.Generator,
) -> None:
    code, ground, other = axes
    vectors = text.text_model.embeddings.token_embedding.weight
    vectors.zero_()
    vectors[list(met)] = OTHER * torch.randn(len(met), len(other), generator=chances) @ other
    vectors[text.spec.vocabulary - 1] = 0  # the end, of which canvases are made
    for token, share in shares.items():
        vectors[token] += share @ code
    for colour, latents in zip(COLOURS, table.grounds):
        for word in colour.words:
            for token in tokens(word):
                vectors[token] += (latents - table.grounds.mean(0)) @ ground
