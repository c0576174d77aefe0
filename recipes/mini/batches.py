"""The recipe's pictures and captions by number, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gouache.prompts.tokenizer import Tokenizer
from gouache.training.objective import step_generator
from recipes.mini import init_vae
from recipes.mini.dataset import TRAINING_SEED, Sample, sample
from recipes.mini.names import COLOURS, Thing, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import UNIFORM, Distribution

SIZE = 128
# Scenes of one thing on a background of one colour: where the colour is the same too, only the things differ, so
# contrastive batches of such scenes teach the text encoder its nouns.
SINGLE_THING = replace(UNIFORM, count_weights=(1.0, 0.0, 0.0), two_colours=0.0)
NEUTRAL = 0  # a token that occurs in no caption
# Words without content: they introduce a noun or the background. When they are missing, a colour directly before a noun
# is still the thing's colour, and any other colour the background's. Dropping them prepares for prompts that phrase
# this in words that no caption has.
FUNCTION_WORDS = {"a", "an", "the", "some", "on", "against", "in", "front", "of", "with", "behind", "it"}
FUNCTION_WORDS |= {"background", "backdrop", "plain"}
FUNCTION_WORD_DROPOUT = 0.2  # the share of augmented captions that lose those words


class SceneData:
    """Samples, images and tokens of scenes.

    `things` is what scenes may contain, and `glyphs` the font's bitmaps for them; by default all things of names.toml
    and the installed font.
    """

    def __init__(self, things: Sequence[Thing] | None = None, glyphs: Glyphs | None = None) -> None:
        self.things = load_things() if things is None else tuple(things)
        self.glyphs = Glyphs() if glyphs is None else glyphs
        self.tokenizer = Tokenizer()
        self.function_tokens = {token for word in FUNCTION_WORDS for token in self.tokenizer.encode(word)}

    def batch(
        self, seed: int, first: int, count: int, size: int = SIZE, distribution: Distribution = UNIFORM
    ) -> tuple[Tensor, list[str]]:
        """(images (count, 3, size, size) in [-1, 1], captions) of the samples from `first` on."""
        return self.render(self.samples(seed, first, count, distribution), size)

    def samples(self, seed: int, first: int, count: int, distribution: Distribution = UNIFORM) -> list[Sample]:
        return [sample(seed, index, self.things, distribution) for index in range(first, first + count)]

    def render(self, samples: Iterable[Sample], size: int) -> tuple[Tensor, list[str]]:
        """(images (B, 3, size, size) in [-1, 1], captions) of given samples."""
        samples = list(samples)
        pixels = np.stack([np.asarray(render(each.scene, self.glyphs, size)) for each in samples])
        return _to_images(pixels), [each.caption for each in samples]

    def contrastive_samples(self, seed: int, number: int, count: int) -> list[Sample]:
        """`count` scenes that differ in their things only: one thing each, all different, on one colour."""
        order = torch.randperm(len(self.things), generator=step_generator(seed, number))[:count].tolist()
        colour = (COLOURS[number // 2 % len(COLOURS)],)
        return [
            sample(seed, number * count + index, (self.things[thing],), SINGLE_THING, colour)
            for index, thing in enumerate(order)
        ]

    def augment(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Insert 1 to 6 neutral tokens (their embeddings are zero) at random positions into half the captions (B, N).

        So an unknown word shifts the positions of the others and changes nothing else. In some of these captions the
        function words are replaced by neutral tokens too. Captions are cut to N tokens, the end token included.
        """
        rows = []
        for row in tokens.tolist():
            if torch.rand((), generator=generator) < 0.5:
                if torch.rand((), generator=generator) < FUNCTION_WORD_DROPOUT:
                    row = [NEUTRAL if token in self.function_tokens else token for token in row]
                for _ in range(int(torch.randint(1, 7, (), generator=generator))):
                    end = row.index(self.tokenizer.end)
                    row.insert(int(torch.randint(1, end + 1, (), generator=generator)), NEUTRAL)
            rows.append([*row[: tokens.shape[1] - 1], self.tokenizer.end])
        return torch.tensor(rows)

    def tokens(self, captions: Iterable[str], length: int) -> Tensor:
        """(B, length) int64: begin token, words, end token, padded with the end token."""
        rows = []
        for caption in captions:
            words = self.tokenizer.encode(caption)[: length - 2]
            row = [self.tokenizer.begin, *words, self.tokenizer.end]
            rows.append(row + [self.tokenizer.end] * (length - len(row)))
        return torch.tensor(rows)

    def colour_statistics(self, count: int = 2000) -> init_vae.ColourStatistics:
        """Statistics of the first `count` training pictures. A run must use one `count` throughout."""
        return init_vae.measure(self.batch(TRAINING_SEED, 0, count)[0])


def _to_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
