"""A difference of weights as two thin factors: the strongest directions of its singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.errors import RequestError

_SPARE = 16  # more directions than are asked for make a randomized SVD exact for all but the last of them


@dataclass(frozen=True)
class Size:
    """How many directions of a module's difference are kept.

    `rank`: at most so many; `conv_rank` for convolutions of more than one pixel, 0 to leave these out. `energy`: as
    few as hold this share of the squared difference. `ratio`: those whose strength is at least the largest over this.
    """

    rank: int = 64
    conv_rank: int = 0
    energy: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.conv_rank < 0:
            raise RequestError("rank", f"{self.rank} and {self.conv_rank} for convolutions: ranks count from 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError("energy", f"{self.energy:g} is no share; it takes numbers above 0, up to 1")
        if self.ratio is not None and self.ratio < 1:
            raise RequestError("ratio", f"{self.ratio:g} would keep nothing; it takes numbers from 1")

    def of(self, module: Tensor) -> int:
        """The most for a difference of this shape; 0 for none."""
        wide = module.ndim == 4 and tuple(module.shape[2:]) != (1, 1)
        return min(self.conv_rank if wide else self.rank, *module.flatten(1).shape)

    def cut(self, values: Tensor, total: float) -> int:
        """How many of the singular values, largest first, of a difference whose squares add up to `total`."""
        count = len(values)
        if self.energy is not None:
            held = values.double().pow(2).cumsum(0) / max(total, 1e-300)
            count = min(count, int((held < self.energy - 1e-9).sum()) + 1)
        if self.ratio is not None:
            count = min(count, int((values >= values[0] / self.ratio).sum()))
        return max(1, count)


def factors(delta: Tensor, rank: int, size: Size) -> tuple[Tensor, Tensor, float, float]:
    """(up (out, r), down (r, in, ...), squares held, squares in all) of a difference, r at most `rank`.

    By randomized SVD (Halko et al. 2011) where that is less work than the whole; both factors get half the strength.
    """
    matrix = delta.flatten(1)
    total = float(matrix.double().pow(2).sum())
    if 4 * (rank + _SPARE) < min(matrix.shape):
        basis = _range(matrix, rank + _SPARE)
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = size.cut(s[:rank], total)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    root = s.sqrt()
    return u * root, (root[:, None] * v).reshape(rank, *delta.shape[1:]), float(s.double().pow(2).sum()), total


def _range(matrix: Tensor, count: int, rounds: int = 4) -> Tensor:
    """An orthonormal basis (rows, count) of the strongest directions, sharpened by power iteration."""
    start = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis
