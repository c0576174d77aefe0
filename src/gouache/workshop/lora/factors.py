"""Factor a difference of weights into a LoRA's up and down matrices by a truncated singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gouache.errors import RequestError

_OVERSAMPLING = 16  # extra directions, which make a randomized SVD exact for nearly all of those requested


@dataclass(frozen=True)
class Size:
    """How many directions (singular vectors) of a module's difference are kept.

    `rank`: the maximum; `conv_rank`: the maximum for convolutions larger than 1x1, 0 to leave these out. `energy`: only
    as many as hold this share of the squared difference. `ratio`: only those whose singular value is at least the
    largest divided by this.
    """

    rank: int = 64
    conv_rank: int = 0
    energy: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.conv_rank < 0:
            raise RequestError(
                "rank", f"got rank {self.rank} and conv rank {self.conv_rank}; expected at least 1 and at least 0"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError("energy", f"got {self.energy:g}; expected a number above 0, at most 1")
        if self.ratio is not None and not self.ratio >= 1:
            raise RequestError(
                "ratio", f"got {self.ratio:g}, which would keep nothing; expected a number of at least 1"
            )

    def of(self, module: Tensor) -> int:
        """The maximum rank for a difference of this shape; 0 if it is left out."""
        spatial = module.ndim == 4 and tuple(module.shape[2:]) != (1, 1)
        return min(self.conv_rank if spatial else self.rank, *module.flatten(1).shape)

    def cut(self, values: Tensor, total: float) -> int:
        """How many of the singular `values`, largest first, to keep; `total` is the squared norm of the difference."""
        count = len(values)
        if self.energy is not None:
            held = values.double().pow(2).cumsum(0) / max(total, 1e-300)
            count = min(count, int((held < self.energy - 1e-9).sum()) + 1)
        if self.ratio is not None:
            count = min(count, int((values >= values[0] / self.ratio).sum()))
        return max(1, count)


def squared_norm(delta: Tensor) -> float:
    """The sum of the squares of all elements, in float64."""
    return float(delta.double().pow(2).sum())


def factors(delta: Tensor, rank: int, size: Size) -> tuple[Tensor, Tensor, float, float]:
    """(up (out, r), down (r, in, ...), squared norm of their product, squared norm of `delta`), r at most `rank`.

    Uses a randomized SVD (Halko et al. 2011) where that is less work than a full one. Each factor contains the square
    roots of the singular values.
    """
    matrix = delta.flatten(1)
    total = squared_norm(matrix)
    if 4 * (rank + _OVERSAMPLING) < min(matrix.shape):
        basis = _range(matrix, rank + _OVERSAMPLING)
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = size.cut(s[:rank], total)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    root = s.sqrt()
    return u * root, (root[:, None] * v).reshape(rank, *delta.shape[1:]), float(s.double().pow(2).sum()), total


def _range(matrix: Tensor, count: int, rounds: int = 4) -> Tensor:
    """An orthonormal basis (rows, count) of the strongest directions, refined by power iteration."""
    start = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis
