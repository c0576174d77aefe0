"""The optional adversary of an autoencoder: a patch discriminator with the adaptive weight of VQGAN.

Isola et al. 2017 (the network), Lim and Ye 2017 (hinge losses), Esser et al. 2021 (the weight). Both players are
trained in the same step: each term of the loss reaches the parameters of one player alone, so that one optimizer and
one checkpoint serve both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_MOST = 1e4  # of the adaptive weight
_LAYERS = 3  # that halve the picture: every output sees 70x70 pixels


class Discriminator(nn.Module):
    """Says of each patch whether it is of a picture (above 0) or of a reconstruction.

    Group norms instead of the original's batch norms: what it says of a picture does not depend on the others.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, _LAYERS + 1):
            before, width = width, channels * min(8, 2**number)
            stride = 2 if number < _LAYERS else 1
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1),
                nn.GroupNorm(math.gcd(32, width), width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W), sides of at least 32 -> (B, 1, about H/8, about W/8)."""
        return self.main(image)


@dataclass(frozen=True)
class Adversary:
    """`weight` multiplies the adaptive weight; both players begin with batch number `start`."""

    discriminator: Discriminator
    weight: float = 0.5
    start: int = 0

    def losses(
        self, images: Tensor, decoded: Tensor, loss: Tensor, last: Tensor, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(what is added to `loss`, the single terms) of batch `number`; nothing before `start`.

        `loss` is that of the reconstruction, `last` the weight of the decoder's last layer, at which the gradients of
        both are compared.
        """
        if number < self.start:
            return torch.zeros_like(loss), {}
        real, fake = self.discriminator(images), self.discriminator(decoded.detach())
        own = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        fooling = -functional_call(self.discriminator, fixed, (decoded,)).mean()
        weight = self.weight * adaptive_weight(loss, fooling, last)
        terms = {"discriminator": own, "adversarial": fooling, "adversarial weight": weight}
        return weight * fooling + own, terms


def adaptive_weight(loss: Tensor, fooling: Tensor, last: Tensor) -> Tensor:
    """The norm of the gradient of `loss` at `last`, divided by that of `fooling`: between 0 and 10,000, without graph.

    So both change the last layer equally, however large their values are. The graphs are kept.
    """
    of_loss, of_fooling = (torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (loss, fooling))
    return (of_loss / (of_fooling + 1e-4)).clamp(0, _MOST).detach()
