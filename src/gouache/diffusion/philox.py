"""The random numbers of torch on an NVIDIA GPU, reproduced on any machine: Philox 4x32-10 with Box-Muller.

Philox (Salmon et al. 2011) is a keyed bijection of a counter. CUDA's generator uses one thread per element
of a tensor: the key is the seed, the counter holds the number of tensors generated before and the element's index. Of
the four output words, the normal of a thread's first element uses two. torch does so while a GPU has a thread for each
element, which holds for all image latents. A1111's "NV" noise follows the same rule, so equal seeds give equal images.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)  # golden ratio, sqrt(3) - 1

# cuRAND maps a word to the middle of its 2^-32 wide cell with these float32 constants.
CELL = np.float64(np.float32(2.3283064e-10))
CELL_OF_TURN = np.float64(np.float32(2.3283064e-10 * 6.2831855))


class NvGenerator:
    """Generates the numbers of `torch.Generator("cuda").manual_seed(seed)`, tensor by tensor."""

    def __init__(self, seed: int) -> None:
        self._key = _words_of(seed)
        self._tensors_generated = 0

    def fork(self) -> NvGenerator:
        return copy.copy(self)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """The next standard normal tensor of `shape`, float32 on the CPU."""
        count = int(np.prod(shape))
        counter = np.zeros((4, count), dtype=np.uint32)
        counter[0] = self._tensors_generated
        counter[2] = np.arange(count, dtype=np.uint32)
        self._tensors_generated += 1
        words = philox4x32(counter, self._key)
        radius = np.sqrt(-2.0 * np.log(words[0] * CELL + CELL / 2))
        angle = words[1] * CELL_OF_TURN + CELL_OF_TURN / 2
        return torch.from_numpy((radius * np.sin(angle)).astype(np.float32)).reshape(shape)


def philox4x32(counter: Words, key: Words, rounds: int = 10) -> Words:
    """Philox 4x32 of counters (4, n) with one key (2,): words (4, n)."""
    a, b, c, d = counter
    for number in range(rounds):
        key_low, key_high = key + KEY_STEPS * np.uint32(number)  # overflow is intended
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = (second >> np.uint64(32)).astype(np.uint32) ^ b ^ key_low
        b = second.astype(np.uint32)
        c = (first >> np.uint64(32)).astype(np.uint32) ^ d ^ key_high
        d = first.astype(np.uint32)
    return np.stack([a, b, c, d])


def _words_of(seed: int) -> Words:
    return np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)
