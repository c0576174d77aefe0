"""The recipe's pictures and captions by number, as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gouache.prompts.tokenizer import Tokenizer
from gouache.training.objective import chance
from recipes.mini import start
from recipes.mini.dataset import TRAINING_SEED, Sample, sample
from recipes.mini.names import COLOURS, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import FIRST_STAGE, Distribution

SIZE = 128
# What is left to tell scenes apart by when their colour is the same: batches of such teach the text tower its nouns.
ALONE = replace(FIRST_STAGE, counts=(1.0, 0.0, 0.0), two_colours=0.0)
NEUTRAL = 0  # a token that no caption holds
# Words that only point to the ground or lead up to a noun. Where they are not said, a colour right before a noun is
# still the thing's, and any other the ground's: so people may put it in words that no caption has.
POINTING = {"a", "an", "the", "some", "on", "against", "in", "front", "of", "with", "behind", "it"}
POINTING |= {"background", "backdrop", "plain"}
TERSE = 0.2  # the share of strewn captions without those words


class Scenes:
    def __init__(self) -> None:
        self.things = load_things()
        self.glyphs = Glyphs()
        self.tokenizer = Tokenizer()
        self.pointing = {token for word in POINTING for token in self.tokenizer.encode(word)}

    def batch(
        self, seed: int, first: int, count: int, size: int = SIZE, distribution: Distribution = FIRST_STAGE
    ) -> tuple[Tensor, list[str]]:
        """(images (count, 3, size, size) in [-1, 1], captions) of the samples from `first` on."""
        return self.drawn(self.samples(seed, first, count, distribution), size)

    def samples(self, seed: int, first: int, count: int, distribution: Distribution = FIRST_STAGE) -> list[Sample]:
        return [sample(seed, index, self.things, distribution) for index in range(first, first + count)]

    def drawn(self, samples: Iterable[Sample], size: int) -> tuple[Tensor, list[str]]:
        samples = list(samples)
        pixels = np.stack([np.asarray(render(each.scene, self.glyphs, size)) for each in samples])
        return _as_images(pixels), [each.caption for each in samples]

    def alike(self, seed: int, number: int, count: int) -> list[Sample]:
        """`count` scenes that only their things tell apart: one thing each, all different, on one colour."""
        order = torch.randperm(len(self.things), generator=chance(seed, number))[:count].tolist()
        colour = (COLOURS[number // 2 % len(COLOURS)],)
        return [
            sample(seed, number * count + index, (self.things[thing],), ALONE, colour)
            for index, thing in enumerate(order)
        ]

    def strewn(self, tokens: Tensor, chances: torch.Generator) -> Tensor:
        """Half the captions (B, N) with words between theirs that nobody taught, which are neutral (zero vectors).

        So a word that is not known moves the others along, and changes nothing else. Some of them, besides, have
        neutral words for all that point.
        """
        rows = []
        for row in tokens.tolist():
            if torch.rand((), generator=chances) < 0.5:
                if torch.rand((), generator=chances) < TERSE:
                    row = [NEUTRAL if token in self.pointing else token for token in row]
                for _ in range(int(torch.randint(1, 7, (), generator=chances))):
                    row.insert(int(torch.randint(1, row.index(self.tokenizer.end) + 1, (), generator=chances)), NEUTRAL)
            rows.append([*row[: tokens.shape[1] - 1], self.tokenizer.end])
        return torch.tensor(rows)

    def tokens(self, captions: Iterable[str], length: int) -> Tensor:
        """(B, length) int64: begin, words, end, and the end again as padding."""
        rows = []
        for caption in captions:
            words = self.tokenizer.encode(caption)[: length - 2]
            row = [self.tokenizer.begin, *words, self.tokenizer.end]
            rows.append(row + [self.tokenizer.end] * (length - len(row)))
        return torch.tensor(rows)

    def colours(self) -> start.Colours:
        return start.measure(self.batch(TRAINING_SEED, 0, 2000)[0])


def _as_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
