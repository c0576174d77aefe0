"""Where the U-Net of `mini` starts: it draws what the text tower's states say, as the formula of the layout has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from recipes.mini import layout_start, listening, whereabouts
from recipes.mini.layout import Layout

WIDTH = 24
SPEC = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=WIDTH)


def states(count: int, seed: int) -> Tensor:
    """Contexts (B, 7, WIDTH) that say something around an average."""
    chances = torch.Generator().manual_seed(seed)
    return 1 + 0.5 * torch.randn(count, 7, WIDTH, generator=chances)


@pytest.fixture(scope="module")
def layout() -> Layout:
    """One that draws smooth things, of which a part is covered."""
    chances = torch.Generator().manual_seed(0)
    layer = Layout(WIDTH, 16)
    fields = F.interpolate(torch.randn(WIDTH, 5, 4, 4, generator=chances), size=(16, 16), mode="bicubic")
    fields[:, 4] *= 0.3
    with torch.no_grad():
        layer.weight[:-4] = fields.flatten(1).T
        layer.weight[-4:] = torch.randn(4, WIDTH, generator=chances)
        layer.bias[:] = -layer.weight.sum(1)  # the average says nothing: states are about 1
        layer.bias[4 * 256 : 5 * 256] += 0.5  # about half is covered
    return layer


@pytest.fixture(scope="module")
def told(layout: Layout) -> layout_start.Said:
    return layout_start.said(layout, states(400, 1).mean(1))


@pytest.fixture(scope="module")
def drawing(told: layout_start.Said) -> layout_start.Drawing:
    return layout_start.fit(told)


@pytest.fixture(scope="module")
def unet(told: layout_start.Said, drawing: layout_start.Drawing) -> UNet:
    torch.manual_seed(0)
    unet = whereabouts.prepare(listening.prepare(UNet(SPEC), states(50, 2)))
    layout_start.prepare(unet, told, drawing)
    return unet


def drawn(unet: UNet, context: Tensor, seed: int = 0) -> Tensor:
    """What stands in the picture's channels before the last norm."""
    seen: list[Tensor] = []
    hook = unet.out[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    chances = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        unet(torch.randn(len(context), 4, 16, 16, generator=chances), torch.full((len(context),), 900.0), context)
    hook.remove()
    return seen[0] / layout_start.QUIET


def share(found: Tensor, wanted: Tensor) -> float:
    """The squared error, as a share of how much what is wanted varies from picture to picture."""
    return float((found - wanted).pow(2).mean() / (wanted - wanted.mean(0)).pow(2).mean())


def test_said_is_the_layout_in_other_words(layout: Layout, told: layout_start.Said):
    context = states(20, 3)
    z = (context.mean(1) - told.mean) @ told.whiten.T

    maps = torch.einsum("bk,kchw->bchw", z, told.drawn) + told.drawn_base
    ground = z @ told.ground + told.ground_base

    picture = maps[:, :4] + (1 - maps[:, 4:]) * ground[:, :, None, None]
    assert_close(picture, layout(context).detach(), atol=1e-3, rtol=1e-3)
    assert_close(
        torch.cov(((states(400, 1).mean(1) - told.mean) @ told.whiten.T).T), torch.eye(len(z.T)), atol=1e-3, rtol=0
    )


def test_the_drawing_comes_near_to_what_is_said(told: layout_start.Said, drawing: layout_start.Drawing):
    z = torch.randn(50, len(told.drawn), generator=torch.Generator().manual_seed(4))

    assert share(drawing(z), torch.einsum("bk,kchw->bchw", z, told.drawn) + told.drawn_base) < 0.02


def test_the_unet_draws_the_layout(unet: UNet, layout: Layout):
    context = states(20, 5)

    maps = drawn(unet, context)

    wanted = layout(context).detach()
    assert share(maps[:, [0, 2, 4, 6]], wanted) < 0.1
    assert_close(maps[:, [10, 12, 14, 16]], -maps[:, [0, 2, 4, 6]], atol=1e-4, rtol=1e-4)


def test_what_it_draws_depends_on_the_words_alone(unet: UNet):
    context = states(2, 6)

    picture = [0, 2, 4, 6]
    assert_close(
        drawn(unet, context, seed=1)[:, picture], drawn(unet, context, seed=2)[:, picture], atol=1e-3, rtol=1e-3
    )


def test_the_last_convolution_is_fitted_by_least_squares(unet: UNet):
    chances = torch.Generator().manual_seed(7)
    x, wanted = torch.randn(8, 4, 16, 16, generator=chances), torch.randn(8, 4, 16, 16, generator=chances)
    t, context = torch.full((8,), 500.0), states(8, 8)
    seen: list[Tensor] = []
    hook = unet.out[1].register_forward_hook(lambda module, inputs, out: seen.append(out))

    layout_start.read_out(unet, lambda number: (x, t, context, wanted), 1)
    with torch.no_grad():
        found = unet(x, t, context)
    hook.remove()

    patches = F.unfold(seen[-1], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    targets = wanted.permute(0, 2, 3, 1).flatten(0, 2).double()
    # A ridge is least squares with rows more, that want every weight to be 0.
    ridge = (1e-4 * patches.pow(2).sum(0).mean()).sqrt() * torch.eye(patches.shape[1])
    more = torch.cat([patches, ridge]), torch.cat([targets, torch.zeros(len(ridge), 4)])
    best = patches @ torch.linalg.lstsq(*more, driver="gelsd").solution
    assert_close(found.permute(0, 2, 3, 1).flatten(0, 2).double(), best, atol=1e-3, rtol=1e-3)
