"""Merge methods: functions that receive the same tensor of each model and return the merged tensor.

All compute in the dtype of their inputs (float32 in `merge`), elementwise or within one tensor, so that models of any
size can be streamed. Random methods seed their generator from the recipe's seed and the tensor's name alone: the order
of tensors and the other tensors of the merge have no influence.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Knobs:
    """The settings of a method for one tensor.

    `alpha`, `beta`: weights of models, or strengths of a difference. `density`: the share of a difference's elements
    that is kept. `epsilon`: the spread of DELLA's drop probabilities. `rank`: the rank that truncated-rank keeps.
    `seed` and `name` (of the tensor) seed the random generator.
    """

    alpha: float = 0.5
    beta: float = 0.5
    density: float = 0.2
    epsilon: float = 0.1
    rank: int = 64
    seed: int = 0
    name: str = ""


Merge = Callable[[Sequence[Tensor], Knobs], Tensor]


@dataclass(frozen=True)
class Method:
    """`inputs`: (fewest, most) models. `knobs`: the settings it uses. `summary`: its formula or description. `base`:
    whether the first model is the base that the others were fine-tuned from.
    """

    merge: Merge
    inputs: tuple[int, int]
    knobs: tuple[str, ...]
    summary: str
    base: bool = False


def weighted_sum(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """(1 - alpha) A + alpha B."""
    a, b = models
    return torch.lerp(a, b, knobs.alpha)


def add_difference(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha (B - C)."""
    a, b, c = models
    return a + knobs.alpha * (b - c)


def sum_twice(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """(1 - beta) ((1 - alpha) A + alpha B) + beta C."""
    a, b, c = models
    return (1 - knobs.beta) * ((1 - knobs.alpha) * a + knobs.alpha * b) + knobs.beta * c


def triple_sum(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """(1 - alpha - beta) A + alpha B + beta C."""
    a, b, c = models
    return (1 - knobs.alpha - knobs.beta) * a + knobs.alpha * b + knobs.beta * c


def slerp(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """Spherical interpolation of the directions of A and B; their norms are interpolated linearly.

    Parallel and opposite tensors do not define a unique great circle; they are interpolated linearly.
    """
    a, b = models
    length_a, length_b = a.norm(), b.norm()
    cosine = (a * b).sum() / (length_a * length_b)
    if not torch.isfinite(cosine) or 1 - cosine.abs() < 1e-6:
        return weighted_sum(models, knobs)
    angle = torch.acos(cosine)
    direction = (
        torch.sin((1 - knobs.alpha) * angle) * a / length_a + torch.sin(knobs.alpha * angle) * b / length_b
    ) / torch.sin(angle)
    return direction * ((1 - knobs.alpha) * length_a + knobs.alpha * length_b)


def cosine_a(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A where the two agree, B where they do not: A's weight is the cosine along the first dimension minus alpha.

    For each column, cos = <a, b> / (|a| |b|) along dimension 0, and A's weight is cos - alpha, clamped to [0, 1].
    """
    a, b = models
    return _by_similarity(a, b, F.cosine_similarity(a, b, dim=0), knobs.alpha)


def cosine_b(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """Like `cosine_a`, with the mean of that cosine and the cosine of the whole tensors."""
    a, b = models
    whole = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    return _by_similarity(a, b, (F.cosine_similarity(a, b, dim=0) + whole) / 2, knobs.alpha)


def _by_similarity(a: Tensor, b: Tensor, similarity: Tensor, alpha: float) -> Tensor:
    weight = (similarity - alpha).clamp(0, 1)
    return weight * a + (1 - weight) * b


def train_difference(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A, as if it had received the training that turned C into B: A + 1.8 alpha s (B - C).

    s = |B - A| / (|B - A| + |B - C|), elementwise: little is added where A is close to B already.
    """
    a, b, c = models
    to_b, trained = (b - a).abs(), (b - c).abs()
    scale = torch.where(to_b + trained > 0, to_b / (to_b + trained), torch.zeros_like(a))
    return a + 1.8 * knobs.alpha * scale * (b - c)


def smooth_add(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha smooth(B - C): a median over 3 neighbours along each dimension, then a Gaussian of sigma 1."""
    a, b, c = models
    return a + knobs.alpha * gaussian(median(b - c))


def ties(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """TIES (Yadav et al. 2023): base + alpha times the merged differences.

    Each difference is trimmed to the share `density` of its largest elements; for each element, the sign of the sum is
    elected, and the values with that sign are averaged. Trimming is done within each tensor.
    """
    base, *tuned = models
    return base + knobs.alpha * _elected([trimmed(each - base, knobs.density) for each in tuned])


def dare(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """DARE (Yu et al. 2023) followed by TIES' sign election: a random share `density` of each difference's elements is
    kept and divided by `density`, which preserves the expectation."""
    base, *tuned = models
    kept = [_randomly_dropped(each - base, knobs, number) for number, each in enumerate(tuned)]
    return base + knobs.alpha * _elected(kept)


def dropout(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """DARE with a plain mean: base + alpha mean(kept differences)."""
    base, *tuned = models
    kept = [_randomly_dropped(each - base, knobs, number) for number, each in enumerate(tuned)]
    return base + knobs.alpha * torch.stack(kept).mean(0)


def della(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """DELLA (Deep et al. 2024): like DARE, but the smaller an element is within its row, the more likely it is dropped.

    The probability of keeping an element rises with its rank in the row, from density - epsilon / 2 for the smallest to
    density + epsilon / 2 for the largest.
    """
    base, *tuned = models
    kept = []
    for number, each in enumerate(tuned):
        delta = each - base
        rows = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
        rank = rows.abs().argsort(1).argsort(1).to(rows)
        probability = knobs.density + knobs.epsilon * (rank / max(1, rows.shape[1] - 1) - 0.5)
        probability = probability.clamp(1e-3, 1)
        random = torch.rand(rows.shape, generator=_generator(knobs, number), dtype=torch.float32).to(rows)
        kept.append((rows * (random < probability) / probability).reshape(delta.shape))
    return base + knobs.alpha * _elected(kept)


def geometric_median(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """The tensor with the least sum of distances to all models' tensors (Weiszfeld's iteration); robust to outliers."""
    points = torch.stack([each.flatten() for each in models])
    centre = points.mean(0)
    for _ in range(100):
        distance = (points - centre).norm(dim=1).clamp_min(1e-12)
        weights = (1 / distance) / (1 / distance).sum()
        updated = (weights[:, None] * points).sum(0)
        if (updated - centre).norm() <= 1e-7 * (1 + centre.norm()):
            centre = updated
            break
        centre = updated
    return centre.view_as(models[0])


def model_stock(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """Model Stock (Jang et al. 2024): between base and mean, the closer to the mean the more the differences agree.

    t = N cos / (1 + (N - 1) cos), with the mean cosine of two differences; the result is t mean + (1 - t) base.
    """
    base, *tuned = models
    deltas = torch.stack([(each - base).flatten() for each in tuned])
    count = len(tuned)
    unit = F.normalize(deltas, dim=1)
    cosines = unit @ unit.T
    cosine = ((cosines.sum() - cosines.trace()) / (count * (count - 1))).clamp(0, 1)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return base + ratio * deltas.mean(0).view_as(base)


def top_k(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha (B - C), restricted to the share `density` of the difference's largest elements."""
    a, b, c = models
    return a + knobs.alpha * trimmed(b - c, knobs.density)


def truncated_rank(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha (B - C), with the difference replaced by its best approximation of rank `rank`; vectors are kept."""
    a, b, c = models
    delta = b - c
    if delta.ndim < 2:
        return a + knobs.alpha * delta
    matrix = delta.flatten(1)
    if knobs.rank < min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u[:, : knobs.rank] * s[: knobs.rank]) @ v[: knobs.rank]
    return a + knobs.alpha * matrix.view_as(delta)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but the share `density` (rounded up) of its largest elements set to zero."""
    keep = min(delta.numel(), math.ceil(density * delta.numel()))
    if keep in (0, delta.numel()):
        return delta if keep else torch.zeros_like(delta)
    least = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= least, delta, torch.zeros_like(delta))


def _elected(deltas: Sequence[Tensor]) -> Tensor:
    """For each element, the mean of the values that have the sign of their sum."""
    stacked = torch.stack(list(deltas))
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)


def _randomly_dropped(delta: Tensor, knobs: Knobs, number: int) -> Tensor:
    kept = torch.rand(delta.shape, generator=_generator(knobs, number)) < knobs.density
    return delta * kept / knobs.density


def _generator(knobs: Knobs, number: int) -> torch.Generator:
    """The random generator for one tensor of model `number`. torch's CPU generator uses only 32 bits of its seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{knobs.seed} {number} {knobs.name}".encode()))


# ---- filters over a tensor of any rank, with reflected borders (the border element itself repeated)


def median(x: Tensor) -> Tensor:
    """The median of each element and its neighbours, 3 along each dimension."""
    if not x.ndim:
        return x
    padded = _reflected(x, 1)
    return torch.cat([_median_of_row(padded[row : row + 3], x.shape[1:]) for row in range(x.shape[0])]).view(x.shape)


def _median_of_row(rows: Tensor, shape: torch.Size) -> Tensor:
    """The medians for the middle one of three padded rows: (1, *shape)."""
    windows = rows
    for dimension in range(1, rows.ndim):
        windows = windows.unfold(dimension, 3, 1)
    windows = windows.movedim(0, -1).reshape(*shape, -1)
    return windows.median(dim=-1).values[None]


def gaussian(x: Tensor) -> Tensor:
    """A Gaussian filter of sigma 1 along each dimension, truncated at 4."""
    radius = 4
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * steps**2)
    kernel = kernel / kernel.sum()
    for dimension in range(x.ndim):
        flat = x.movedim(dimension, -1)
        padded = _reflected_last(flat.reshape(-1, 1, flat.shape[-1]), radius)
        x = F.conv1d(padded, kernel[None, None]).view(flat.shape).movedim(-1, dimension)
    return x


def _reflected(x: Tensor, by: int) -> Tensor:
    for dimension in range(x.ndim):
        x = _reflected_last(x.movedim(dimension, -1), by).movedim(-1, dimension)
    return x


def _reflected_last(x: Tensor, by: int) -> Tensor:
    """`x` with its last dimension padded by `by` at both ends: 1 0 | 0 1 2 | 2 1, reflected repeatedly if needed."""
    length = x.shape[-1]
    indices = torch.arange(-by, length + by) % (2 * length)
    return x[..., torch.where(indices < length, indices, 2 * length - 1 - indices)]


_ALPHA, _RANDOM = ("alpha",), ("alpha", "density", "seed")
METHODS: Mapping[str, Method] = {
    "weighted-sum": Method(weighted_sum, (2, 2), _ALPHA, "(1 - alpha) A + alpha B"),
    "add-difference": Method(add_difference, (3, 3), _ALPHA, "A + alpha (B - C)"),
    "sum-twice": Method(sum_twice, (3, 3), ("alpha", "beta"), "(1 - beta) ((1 - alpha) A + alpha B) + beta C"),
    "triple-sum": Method(triple_sum, (3, 3), ("alpha", "beta"), "(1 - alpha - beta) A + alpha B + beta C"),
    "slerp": Method(slerp, (2, 2), _ALPHA, "spherical interpolation from A to B"),
    "cosine-a": Method(cosine_a, (2, 2), _ALPHA, "A where the two agree, B elsewhere, column by column"),
    "cosine-b": Method(cosine_b, (2, 2), _ALPHA, "cosine-a averaged with the similarity of whole tensors"),
    "train-difference": Method(train_difference, (3, 3), _ALPHA, "A with the training that turned C into B"),
    "smooth-add": Method(smooth_add, (3, 3), _ALPHA, "A + alpha (B - C), with the difference smoothed"),
    "ties": Method(ties, (3, 64), ("alpha", "density"), "BASE + alpha (differences with the elected sign)", base=True),
    "dare": Method(dare, (3, 64), _RANDOM, "ties with random dropout of the differences", base=True),
    "dropout": Method(dropout, (2, 64), _RANDOM, "BASE + alpha (mean of differences after dropout)", base=True),
    "della": Method(della, (3, 64), (*_RANDOM, "epsilon"), "dare, dropping small elements more often", base=True),
    "geometric-median": Method(geometric_median, (3, 64), (), "the least sum of distances to all models"),
    "model-stock": Method(model_stock, (3, 64), (), "between BASE and the mean, by agreement", base=True),
    "top-k": Method(top_k, (3, 3), ("alpha", "density"), "A + alpha (B - C), largest elements only"),
    "truncated-rank": Method(truncated_rank, (3, 3), ("alpha", "rank"), "A + alpha (B - C), of rank RANK"),
}
"""Every method by its name on the command line and in recipes."""
