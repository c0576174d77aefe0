"""Where the U-Net of `mini` starts: it draws what the text tower's canvas tells, as the canvas' own layer has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from recipes.mini import canvas_start, listening, whereabouts
from recipes.mini.canvas import END, FIRST, Canvas, codes

WIDTH = 128
SPEC = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=WIDTH)


def states(count: int, seed: int) -> Tensor:
    """Contexts (B, 77, WIDTH) that say anything, and in their first four numbers which patch a token tells of."""
    said = torch.randn(count, 77, WIDTH, generator=torch.Generator().manual_seed(seed))
    said[..., :4] = 0
    said[:, FIRST:END, :4] = codes()
    return said


@pytest.fixture(scope="module")
def canvas() -> Canvas:
    """One that draws anything; about half of it is covered, hardly anything less than not at all."""
    chances = torch.Generator().manual_seed(0)
    canvas = Canvas(WIDTH)
    with torch.no_grad():
        canvas.draw.weight.copy_(0.08 * torch.randn(canvas.draw.weight.shape, generator=chances))
        canvas.draw.weight[64:80] *= 0.15
        canvas.draw.bias.zero_()
        canvas.draw.bias[64:80] = 0.6
        canvas.place.weight.zero_()
        canvas.place.weight[:, :4] = torch.eye(4)
    return canvas


@pytest.fixture(scope="module")
def unet(canvas: Canvas) -> UNet:
    torch.manual_seed(0)
    unet = whereabouts.prepare(listening.prepare(UNet(SPEC), states(20, 1)))
    canvas_start.prepare(unet, canvas)
    canvas_start.hush(unet)
    return unet


def drawn(unet: UNet, context: Tensor, seed: int = 0) -> Tensor:
    """What stands in the picture's channels before the last norm."""
    seen: list[Tensor] = []
    hook = unet.out[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    chances = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        unet(torch.randn(len(context), 4, 16, 16, generator=chances), torch.full((len(context),), 900.0), context)
    hook.remove()
    return seen[0][:, [0, 2, 4, 6, 10, 12, 14, 16]] / canvas_start.QUIET


def test_a_canvas_is_made_of_its_patches_row_by_row(canvas: Canvas):
    context = states(1, 2)
    told = canvas.draw(context[0, FIRST:END])
    patch = told[6]  # the second row's third
    things, cover, ground = patch[:64].view(4, 4, 4), patch[64:80].view(4, 4), patch[80:]

    picture = canvas(context)[0]

    assert_close(picture[:, 4:8, 8:12], things + (1 - cover) * ground[:, None, None])


def test_only_tokens_of_the_canvas_may_say_a_place(canvas: Canvas):
    right = states(2, 3)
    wrong = right.clone()
    wrong[:, END] = right[:, FIRST]

    assert canvas.misplaced(right) < 1e-12
    assert_close(canvas.misplaced(wrong), torch.tensor(1 / 77))


def test_the_unet_draws_the_canvas_and_its_negative(unet: UNet, canvas: Canvas):
    context = states(8, 4)

    maps = drawn(unet, context)

    wanted = canvas(context).detach()
    assert (maps[:, :4] - wanted).pow(2).mean() < 0.01 * wanted.var()
    assert_close(maps[:, 4:], -maps[:, :4], atol=1e-4, rtol=1e-4)


def test_what_it_draws_depends_on_the_words_alone(unet: UNet):
    context = states(2, 5)

    assert_close(drawn(unet, context, seed=1), drawn(unet, context, seed=2), atol=1e-3, rtol=1e-3)


def test_cells_of_the_largest_map_say_nothing_to_each_other_computed_or_not(unet: UNet):
    whole = UNet(SPEC)
    whole.load_state_dict(unet.state_dict())
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([300.0]), states(1, 6)

    with torch.no_grad():
        assert_close(whole(x, t, context), unet(x, t, context))
    assert not unet.input_blocks[1][1].transformer_blocks[0].attn1.to_out[0].weight.requires_grad
    assert unet.input_blocks[4][1].transformer_blocks[0].attn1.to_out[0].weight.requires_grad


def test_the_last_convolution_is_fitted_by_least_squares(unet: UNet):
    chances = torch.Generator().manual_seed(7)
    x, wanted = torch.randn(8, 4, 16, 16, generator=chances), torch.randn(8, 4, 16, 16, generator=chances)
    t, context = torch.full((8,), 500.0), states(8, 8)
    seen: list[Tensor] = []
    hook = unet.out[1].register_forward_hook(lambda module, inputs, out: seen.append(out))

    canvas_start.read_out(unet, lambda number: (x, t, context, wanted), 1)
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
