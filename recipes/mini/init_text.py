"""Initial weights of the text encoder: it starts with the appearance of its nouns.

How each thing looks is known before any training: the pictures of all things, without background, form a table, and
their principal components give each thing a code of few numbers. An encoder that starts with random vectors finds such
a code late, noun by noun. This one starts with it:

    embeddings   each token has a share of its nouns' codes, by least squares, so that the shares of a noun's tokens sum
                 to its code; colour words have the background's latents
    layer 1      attention that averages, so that each layout token receives the sum of the caption's tokens
    layers 1, 2  feed-forwards: hidden units gated by one patch's position map the code to that patch's picture

So the layout of a caption for one thing of medium size is right from the start, and training adds the rest: sizes,
positions, two things, other colours, words without content. All of these quantities use orthogonal directions, next to
one constant direction that is the same in all tokens and so large that the norms' divisors are nearly constant. The
weights built here are frozen (`freeze`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gouache.nn.clip_text import ClipText
from recipes.mini.layout_tokens import CELLS, FIRST, PATCHES, SIDE, LayoutHead, patch_codes
from recipes.mini.names import COLOURS, Thing
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import Background, PlacedThing, Scene

MEDIUM = 0.67  # the size of things in the table, as a fraction of the frame
CODE = 72  # numbers in a noun's code
PICTURE = 32  # numbers in a patch's picture
CONSTANT = 8.0  # the coordinate that all tokens share
NORM = 8.7  # the length of a layout token, which is about what the norms divide by
CODE_SCALE = 0.2  # the deviation of a code's coordinates if a thing is alone, and of the picture's
OTHER_SCALE = 0.3  # the deviation of everything else that distinguishes tokens
GATE = 6.0  # the pre-activation of a unit's gate: +GATE in its patch, at most -GATE in the others
RIDGE = 1e-3
GAIN = 8.0  # the factor on the average over tokens; about 40 would make it their sum


@dataclass(frozen=True)
class AppearanceTable:
    """How things and colours look: `things` (things, 5, 16, 16) are latents times alpha, and alpha.

    `backgrounds` (colours, 4) are the latents of plain backgrounds.
    """

    things: Tensor
    backgrounds: Tensor


def measure_appearance(
    things: Sequence[Thing], glyphs: Glyphs, encode: Callable[[Tensor], Tensor], size: int = 128
) -> AppearanceTable:
    """Render things on black and on white: where the two differ, the background is visible, which gives alpha."""
    named = {colour.name: colour for colour in COLOURS}

    def latents(colour: str, placed: Sequence[tuple[PlacedThing, ...]]) -> Tensor:
        background = Background(named[colour], named[colour])
        pixels = np.stack([np.asarray(render(Scene(each, background), glyphs, size)) for each in placed])
        return encode(torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)

    alone = [(PlacedThing(thing, 0.5, 0.5, MEDIUM),) for thing in things]
    on_white, on_black = latents("white", alone), latents("black", alone)
    white, black = latents("white", [()]), latents("black", [()])
    difference = white - black
    transparency = ((on_white - on_black) * difference).sum(1, keepdim=True) / difference.pow(2).sum(1, keepdim=True)
    foreground = torch.cat([on_black - transparency * black, 1 - transparency], 1)
    return AppearanceTable(foreground, torch.cat([latents(colour.name, [()]).mean((2, 3)) for colour in COLOURS]))


@torch.no_grad()
def initialise(
    text: ClipText,
    layout: LayoutHead,
    table: AppearanceTable,
    names: Mapping[str, int],
    tokenize: Callable[[str], Sequence[int]],
    common: set[int],
    used: Sequence[int],
) -> None:
    """Set the weights of a newly built text encoder of width 128 and of its layout head.

    `names` maps every name of a thing to its row in the table; `common` are tokens of captions that do not depend on
    the thing; `used` are all tokens that captions can contain: the vectors of all others are zero.
    """
    width = text.spec.width
    generator = torch.Generator().manual_seed(4)
    axes = _orthogonal_axes(width, generator)
    constant, position, code = axes[:1], axes[1:5], axes[5 : 5 + CODE]
    background, picture = axes[5 + CODE : 9 + CODE], axes[9 + CODE : 9 + CODE + PICTURE]
    free = axes[9 + CODE + PICTURE :]
    other = torch.cat([picture, free])  # words have no picture, so they can use its axes

    # Codes of things, and their pictures by patches.
    flat = table.things.flatten(1)
    left, scales, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    codes = left[:, :CODE] * scales[:CODE]
    codes = codes * (CODE_SCALE / codes.std())
    patches = table.things.unflatten(2, (SIDE, CELLS)).unflatten(4, (SIDE, CELLS)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = patches.flatten(1, 2)  # things, patches, 5 * 16
    mean_patch = patches.mean((0, 1))
    bases = torch.linalg.svd((patches - mean_patch).flatten(0, 1), full_matrices=False)[2][:PICTURE]
    parts = (patches - mean_patch) @ bases.T
    scale = parts.std() / CODE_SCALE
    # A patch's picture is linear in the code.
    mean_parts, parts = parts.mean(0) / scale, (parts - parts.mean(0)) / scale
    maps = (torch.linalg.pinv(codes, rtol=1e-4) @ parts.flatten(1)).unflatten(1, (PATCHES, PICTURE))

    shares = _token_shares(codes, names, tokenize, common)
    _set_embeddings(text, shares, table, tokenize, used, (code, background, other), generator)
    positions = text.text_model.embeddings.position_embedding.weight
    positions.copy_(CODE_SCALE * torch.randn(len(positions), len(free), generator=generator) @ free)
    positions += CONSTANT * constant
    positions[FIRST : FIRST + PATCHES] += patch_codes() @ position

    for layer in text.text_model.encoder.layers:
        for output in (layer.self_attn.out_proj, layer.mlp.fc2):
            output.weight.zero_()
            output.bias.zero_()
    first = text.text_model.encoder.layers[0]
    norm_scale = width**0.5 / CONSTANT  # about what the norms multiply by
    attended = torch.cat([code, background])
    first.self_attn.q_proj.weight.zero_()
    first.self_attn.q_proj.bias.zero_()
    first.self_attn.v_proj.weight[: len(attended)] = attended / norm_scale
    first.self_attn.v_proj.bias.zero_()
    # An average over all tokens up to this one: the first patches, with fewer tokens, receive larger values.
    first.self_attn.out_proj.weight[:, : len(attended)] = GAIN * attended.T

    norm_scale = width**0.5 / NORM
    for number, layer in enumerate(list(text.text_model.encoder.layers)[:2]):
        half = slice(number * PICTURE // 2, (number + 1) * PICTURE // 2)
        fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
        for patch, signs in enumerate(patch_codes()):
            to_sum = (FIRST + patch + 1) / GAIN
            gate, value = GATE * (signs @ position), to_sum * maps[:, patch, half].T @ code
            for kind, sign in enumerate((1, -1)):  # f(GATE + x) - f(GATE - x) = 2 x where the gate is open, else 0
                rows = slice((2 * patch + kind) * PICTURE // 2, (2 * patch + kind + 1) * PICTURE // 2)
                fc1.weight[rows] = (gate + sign * value) / norm_scale
                fc1.bias[rows] = sign * mean_parts[patch, half] - 3 * GATE
                fc2.weight[:, rows] = sign * picture[half].T / 2

    layout.place.weight.copy_(position / norm_scale)
    draw = layout.draw
    draw.weight[:-4] = scale * bases.T @ picture / norm_scale
    draw.weight[-4:] = background * (FIRST + PATCHES / 2) / GAIN / norm_scale
    draw.bias[:-4], draw.bias[-4:] = mean_patch, table.backgrounds.mean(0)


def freeze(text: ClipText, layout: LayoutHead) -> None:
    """Freeze the initial weights while the rest is trained: a common learning rate would degrade them at first."""
    built = PATCHES * PICTURE
    first, second = list(text.text_model.encoder.layers)[:2]
    text.text_model.embeddings.position_embedding.requires_grad_(False)
    text.text_model.final_layer_norm.requires_grad_(False)
    layout.requires_grad_(False)
    first.self_attn.requires_grad_(False)
    for layer in (first, second):
        layer.layer_norm1.requires_grad_(False)
        layer.layer_norm2.requires_grad_(False)
        layer.mlp.fc1.weight.register_hook(_zero_rows(built))
        layer.mlp.fc1.bias.register_hook(_zero_rows(built))
        layer.mlp.fc2.weight.register_hook(lambda gradient: _zero_rows(built)(gradient.T).T)


def _zero_rows(count: int) -> Callable[[Tensor], Tensor]:
    def zeroed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:count] = 0
        return gradient

    return zeroed


def _orthogonal_axes(width: int, generator: torch.Generator) -> Tensor:
    """(width - 1, width): unit vectors orthogonal to each other and to the mean, which the norms subtract."""
    basis = torch.cat([torch.ones(width, 1), torch.randn(width, width - 1, generator=generator)], 1)
    return torch.linalg.qr(basis)[0].T[1:]


def _token_shares(
    codes: Tensor, names: Mapping[str, int], tokenize: Callable[[str], Sequence[int]], common: set[int]
) -> dict[int, Tensor]:
    """A vector (CODE,) for each token such that the sum over a name's tokens is about its thing's code."""
    split = {name: [token for token in tokenize(name) if token not in common] for name in names}
    tokens = sorted({token for parts in split.values() for token in parts})
    column = {token: index for index, token in enumerate(tokens)}
    counts = torch.zeros(len(names), len(tokens))
    for row, parts in enumerate(split.values()):
        for token in parts:
            counts[row, column[token]] += 1
    targets = codes[list(names.values())]
    products = counts.T @ counts + RIDGE * torch.eye(len(tokens))
    return dict(zip(tokens, torch.linalg.solve(products, counts.T @ targets)))


def _set_embeddings(
    text: ClipText,
    shares: Mapping[int, Tensor],
    table: AppearanceTable,
    tokenize: Callable[[str], Sequence[int]],
    used: Sequence[int],
    axes: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    code, background, other = axes
    vectors = text.text_model.embeddings.token_embedding.weight
    vectors.zero_()
    vectors[list(used)] = OTHER_SCALE * torch.randn(len(used), len(other), generator=generator) @ other
    vectors[text.spec.vocabulary - 1] = 0  # the end token, which the layout tokens are
    for token, share in shares.items():
        vectors[token] += share @ code
    for colour, latents in zip(COLOURS, table.backgrounds):
        for word in colour.words:
            for token in tokenize(word):
                vectors[token] += (latents - table.backgrounds.mean(0)) @ background
