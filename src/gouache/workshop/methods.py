"""Ways to merge weights: functions of tensors, one tensor of each model at a time.

All compute in the dtype they are handed (float32 in `merge`), elementwise or within one tensor, so that models of any
size stream through. Where a method draws by lot, its chance comes from a seed and the tensor's name alone: the order of
tensors, and what else is merged, change nothing.
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
    """What steers a method, for one tensor.

    `alpha`, `beta`: shares, or strengths of a difference. `density`: the share of a difference that is kept. `epsilon`:
    how far DELLA's chances spread. `rank`: of a truncated difference. `seed` and `name` settle what is drawn by lot.
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
    """`inputs`: (fewest, most) models. `base`: whether the first of several is what the others were tuned from.

    `knobs`: those that it heeds.
    """

    merge: Merge
    inputs: tuple[int, int]
    knobs: tuple[str, ...]
    says: str
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
    """From A to B along the great circle of the two tensors' directions; lengths are interpolated straight.

    Where they point the same or opposite ways, there is no one circle, and the way is straight.
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
    """A where the two agree, B where they do not: the share of A is the cosine along the first dimension, less alpha.

    For each column, cos = <a, b> / (|a| |b|) along dimension 0, and A's share is cos - alpha, held between 0 and 1.
    """
    a, b = models
    return _by_similarity(a, b, F.cosine_similarity(a, b, dim=0), knobs.alpha)


def cosine_b(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """As cosine A, with the mean of that cosine and the cosine of the whole tensors."""
    a, b = models
    whole = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    return _by_similarity(a, b, (F.cosine_similarity(a, b, dim=0) + whole) / 2, knobs.alpha)


def _by_similarity(a: Tensor, b: Tensor, similarity: Tensor, alpha: float) -> Tensor:
    share = (similarity - alpha).clamp(0, 1)
    return share * a + (1 - share) * b


def train_difference(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A, as if it had been trained by what made B of C: A + 1.8 alpha s (B - C).

    s = |B - A| / (|B - A| + |B - C|), element by element: little is added where A is already where B is.
    """
    a, b, c = models
    there, made = (b - a).abs(), (b - c).abs()
    scale = torch.where(there + made > 0, there / (there + made), torch.zeros_like(a))
    return a + 1.8 * knobs.alpha * scale * (b - c)


def smooth_add(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha smooth(B - C): a median over 3 neighbours along each dimension, then a Gaussian of sigma 1."""
    a, b, c = models
    return a + knobs.alpha * gaussian(median(b - c))


def ties(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """TIES (Yadav et al. 2023): base + alpha times what the differences agree on.

    Of each difference only the largest elements are kept, a share `density`; the sign of their sum is elected, and
    those that have it are averaged. Trimming is within each tensor.
    """
    base, *tuned = models
    return base + knobs.alpha * _elected([trimmed(each - base, knobs.density) for each in tuned])


def dare(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """DARE (Yu et al. 2023) before the election of TIES: of each difference a random share `density` is kept, and
    scaled by its inverse, so that its expectation stays."""
    base, *tuned = models
    kept = [_dropped(each - base, knobs, number) for number, each in enumerate(tuned)]
    return base + knobs.alpha * _elected(kept)


def dropout(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """DARE with a plain mean: base + alpha mean(kept differences)."""
    base, *tuned = models
    kept = [_dropped(each - base, knobs, number) for number, each in enumerate(tuned)]
    return base + knobs.alpha * torch.stack(kept).mean(0)


def della(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """DELLA (Deep et al. 2024): as DARE, but the smaller an element within its row, the likelier it is dropped.

    The chance of being kept runs from density - epsilon / 2 for the smallest to density + epsilon / 2 for the largest.
    """
    base, *tuned = models
    kept = []
    for number, each in enumerate(tuned):
        delta = each - base
        rows = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
        rank = rows.abs().argsort(1).argsort(1).to(rows)
        chance = knobs.density + knobs.epsilon * (rank / max(1, rows.shape[1] - 1) - 0.5)
        chance = chance.clamp(1e-3, 1)
        stays = torch.rand(rows.shape, generator=_lots(knobs, number), dtype=torch.float32).to(rows) < chance
        kept.append((rows * stays / chance).reshape(delta.shape))
    return base + knobs.alpha * _elected(kept)


def geometric_median(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """The tensor whose summed distance from all models' is least (Weiszfeld's iteration); outliers hardly move it."""
    points = torch.stack([each.flatten() for each in models])
    centre = points.mean(0)
    for _ in range(100):
        distance = (points - centre).norm(dim=1).clamp_min(1e-12)
        shares = (1 / distance) / (1 / distance).sum()
        moved = (shares[:, None] * points).sum(0)
        if (moved - centre).norm() <= 1e-7 * (1 + centre.norm()):
            centre = moved
            break
        centre = moved
    return centre.view_as(models[0])


def model_stock(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """Model Stock (Jang et al. 2024): between base and mean, the nearer the mean the more the differences agree.

    t = N cos / (1 + (N - 1) cos), with the mean cosine of two differences; the result is t mean + (1 - t) base.
    """
    base, *tuned = models
    deltas = torch.stack([(each - base).flatten() for each in tuned])
    count = len(tuned)
    unit = F.normalize(deltas, dim=1)
    cosines = unit @ unit.T
    cosine = ((cosines.sum() - cosines.trace()) / (count * (count - 1))).clamp(0, 1)
    share = count * cosine / (1 + (count - 1) * cosine)
    return base + share * deltas.mean(0).view_as(base)


def top_k(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha (B - C), of which only the largest elements are added, a share `density` of them."""
    a, b, c = models
    return a + knobs.alpha * trimmed(b - c, knobs.density)


def truncated_rank(models: Sequence[Tensor], knobs: Knobs) -> Tensor:
    """A + alpha (B - C), of which the best approximation of rank `rank` is added; vectors are added whole."""
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
    """The largest elements of `delta`, a share `density` of them, rounded up; zeros elsewhere."""
    keep = min(delta.numel(), math.ceil(density * delta.numel()))
    if keep in (0, delta.numel()):
        return delta if keep else torch.zeros_like(delta)
    least = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= least, delta, torch.zeros_like(delta))


def _elected(deltas: Sequence[Tensor]) -> Tensor:
    """The mean of those elements that have the sign of their sum."""
    stacked = torch.stack(list(deltas))
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)


def _dropped(delta: Tensor, knobs: Knobs, number: int) -> Tensor:
    stays = torch.rand(delta.shape, generator=_lots(knobs, number)) < knobs.density
    return delta * stays / knobs.density


def _lots(knobs: Knobs, number: int) -> torch.Generator:
    """The chance of one tensor of one model. The generator heeds no more than 32 bits of what it is seeded with."""
    return torch.Generator().manual_seed(zlib.crc32(f"{knobs.seed} {number} {knobs.name}".encode()))


# ---- filters over a tensor of any rank, mirrored at its edges with the edge itself repeated


def median(x: Tensor) -> Tensor:
    """The median of each element and its neighbours, 3 along each dimension."""
    if not x.ndim:
        return x
    padded = _mirrored(x, 1)
    return torch.cat([_median_of_row(padded[row : row + 3], x.shape[1:]) for row in range(x.shape[0])]).view(x.shape)


def _median_of_row(rows: Tensor, shape: torch.Size) -> Tensor:
    """Of three padded rows, the medians of the middle one: (1, *shape)."""
    windows = rows
    for dimension in range(1, rows.ndim):
        windows = windows.unfold(dimension, 3, 1)
    windows = windows.movedim(0, -1).reshape(*shape, -1)
    return windows.median(dim=-1).values[None]


def gaussian(x: Tensor) -> Tensor:
    """A Gaussian of sigma 1 along each dimension, cut off at 4."""
    radius = 4
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * steps**2)
    kernel = kernel / kernel.sum()
    for dimension in range(x.ndim):
        flat = x.movedim(dimension, -1)
        padded = _mirrored_last(flat.reshape(-1, 1, flat.shape[-1]), radius)
        x = F.conv1d(padded, kernel[None, None]).view(flat.shape).movedim(-1, dimension)
    return x


def _mirrored(x: Tensor, by: int) -> Tensor:
    for dimension in range(x.ndim):
        x = _mirrored_last(x.movedim(dimension, -1), by).movedim(-1, dimension)
    return x


def _mirrored_last(x: Tensor, by: int) -> Tensor:
    """`x` with `by` more elements at both ends of its last dimension: 1 0 | 0 1 2 | 2 1, as often as it takes."""
    length = x.shape[-1]
    places = torch.arange(-by, length + by) % (2 * length)
    return x[..., torch.where(places < length, places, 2 * length - 1 - places)]


_ALPHA, _DRAWN = ("alpha",), ("alpha", "density", "seed")
METHODS: Mapping[str, Method] = {
    "weighted-sum": Method(weighted_sum, (2, 2), _ALPHA, "(1 - alpha) A + alpha B"),
    "add-difference": Method(add_difference, (3, 3), _ALPHA, "A + alpha (B - C)"),
    "sum-twice": Method(sum_twice, (3, 3), ("alpha", "beta"), "(1 - beta) ((1 - alpha) A + alpha B) + beta C"),
    "triple-sum": Method(triple_sum, (3, 3), ("alpha", "beta"), "(1 - alpha - beta) A + alpha B + beta C"),
    "slerp": Method(slerp, (2, 2), _ALPHA, "from A to B along a circle"),
    "cosine-a": Method(cosine_a, (2, 2), _ALPHA, "A where the two agree, B elsewhere, column by column"),
    "cosine-b": Method(cosine_b, (2, 2), _ALPHA, "the same, with the agreement of whole tensors mixed in"),
    "train-difference": Method(train_difference, (3, 3), _ALPHA, "A, as if trained by what made B of C"),
    "smooth-add": Method(smooth_add, (3, 3), _ALPHA, "A + alpha (B - C), smoothed"),
    "ties": Method(ties, (3, 64), ("alpha", "density"), "BASE + alpha (what the tuned ones agree on)", base=True),
    "dare": Method(dare, (3, 64), _DRAWN, "the same, of randomly thinned differences", base=True),
    "dropout": Method(dropout, (2, 64), _DRAWN, "BASE + alpha (mean of thinned differences)", base=True),
    "della": Method(della, (3, 64), (*_DRAWN, "epsilon"), "as dare; small elements are dropped oftener", base=True),
    "geometric-median": Method(geometric_median, (3, 64), (), "what is nearest to all of them"),
    "model-stock": Method(model_stock, (3, 64), (), "between BASE and mean, by how much they agree", base=True),
    "top-k": Method(top_k, (3, 3), ("alpha", "density"), "A + alpha (B - C), its largest elements only"),
    "truncated-rank": Method(truncated_rank, (3, 3), ("alpha", "rank"), "A + alpha (B - C), of low rank"),
}
"""Every method by the name that the command line and recipes use."""
