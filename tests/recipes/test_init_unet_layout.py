"""Initial weights of mini's U-Net, part 3: it draws what the text encoder's layout tokens predict, as the head does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from recipes.mini import init_unet_layout, init_unet_positions, init_unet_whitening
from recipes.mini.layout_tokens import END, FIRST, LayoutHead, patch_codes

WIDTH = 128
SPEC = UNetSpec(channels=64, channel_mult=(1, 1, 1, 2), context_dim=WIDTH)


def states(count: int, seed: int) -> Tensor:
    """Random contexts (B, 77, WIDTH); the first four numbers are the position codes of the layout tokens, else zero."""
    context = torch.randn(count, 77, WIDTH, generator=torch.Generator().manual_seed(seed))
    context[..., :4] = 0
    context[:, FIRST:END, :4] = patch_codes()
    return context


@pytest.fixture(scope="module")
def layout() -> LayoutHead:
    """A random one; alpha is about 0.5, rarely below 0."""
    generator = torch.Generator().manual_seed(0)
    layout = LayoutHead(WIDTH)
    with torch.no_grad():
        layout.draw.weight.copy_(0.08 * torch.randn(layout.draw.weight.shape, generator=generator))
        layout.draw.weight[64:80] *= 0.15
        layout.draw.bias.zero_()
        layout.draw.bias[64:80] = 0.6
        layout.place.weight.zero_()
        layout.place.weight[:, :4] = torch.eye(4)
    return layout


@pytest.fixture(scope="module")
def unet(layout: LayoutHead) -> UNet:
    torch.manual_seed(0)
    unet = init_unet_positions.initialise(init_unet_whitening.initialise(UNet(SPEC), states(20, 1)))
    init_unet_layout.initialise(unet, layout)
    init_unet_layout.disable_self_attention(unet)
    return unet


def picture_channels(unet: UNet, context: Tensor, seed: int = 0) -> Tensor:
    """The picture's channels before the last norm, (B, 8, 16, 16): four latents, and the same negated."""
    features: list[Tensor] = []
    hook = unet.out[0].register_forward_hook(lambda module, inputs, out: features.append(inputs[0]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        unet(torch.randn(len(context), 4, 16, 16, generator=generator), torch.full((len(context),), 900.0), context)
    hook.remove()
    return features[0][:, [0, 2, 4, 6, 10, 12, 14, 16]] / init_unet_layout.PICTURE_SCALE


def test_a_layout_is_composed_of_its_patches_row_by_row(layout: LayoutHead):
    context = states(1, 2)
    decoded = layout.draw(context[0, FIRST:END])
    patch = decoded[6]  # the third of the second row
    things, alpha, background = patch[:64].view(4, 4, 4), patch[64:80].view(4, 4), patch[80:]

    picture = layout(context)[0]

    assert_close(picture[:, 4:8, 8:12], things + (1 - alpha) * background[:, None, None])


def test_the_position_loss_counts_position_codes_outside_the_layout(layout: LayoutHead):
    right = states(2, 3)
    wrong = right.clone()
    wrong[:, END] = right[:, FIRST]

    assert layout.position_loss(right) < 1e-12
    assert_close(layout.position_loss(wrong), torch.tensor(1 / 77))


def test_the_unet_draws_the_layout_and_its_negative(unet: UNet, layout: LayoutHead):
    context = states(8, 4)

    maps = picture_channels(unet, context)

    expected = layout(context).detach()
    assert (maps[:, :4] - expected).pow(2).mean() < 0.01 * expected.var()
    assert_close(maps[:, 4:], -maps[:, :4], atol=1e-4, rtol=1e-4)


def test_the_drawn_picture_depends_on_the_context_alone(unet: UNet):
    context = states(2, 5)

    assert_close(picture_channels(unet, context, 1), picture_channels(unet, context, 2), atol=1e-3, rtol=1e-3)


def test_disabled_self_attention_gives_the_output_of_the_same_weights_with_it(unet: UNet):
    whole = UNet(SPEC)
    whole.load_state_dict(unet.state_dict())
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([300.0]), states(1, 6)

    with torch.no_grad():
        assert_close(whole(x, t, context), unet(x, t, context))
    assert not unet.input_blocks[1][1].transformer_blocks[0].attn1.to_out[0].weight.requires_grad
    assert unet.input_blocks[4][1].transformer_blocks[0].attn1.to_out[0].weight.requires_grad


def test_the_last_convolution_is_fitted_by_least_squares(unet: UNet):
    generator = torch.Generator().manual_seed(7)
    x, target = torch.randn(8, 4, 16, 16, generator=generator), torch.randn(8, 4, 16, 16, generator=generator)
    t, context = torch.full((8,), 500.0), states(8, 8)
    features: list[Tensor] = []
    hook = unet.out[1].register_forward_hook(lambda module, inputs, out: features.append(out))

    init_unet_layout.fit_output_conv(unet, lambda number: (x, t, context, target), 1)
    with torch.no_grad():
        fitted = unet(x, t, context)
    hook.remove()

    patches = F.unfold(features[-1], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    targets = target.permute(0, 2, 3, 1).flatten(0, 2).double()
    # A ridge is least squares with more rows, whose target for every weight is 0.
    ridge = (1e-4 * patches.pow(2).sum(0).mean()).sqrt() * torch.eye(patches.shape[1])
    extended = torch.cat([patches, ridge]), torch.cat([targets, torch.zeros(len(ridge), 4)])
    best = patches @ torch.linalg.lstsq(*extended, driver="gelsd").solution
    assert_close(fitted.permute(0, 2, 3, 1).flatten(0, 2).double(), best, atol=1e-3, rtol=1e-3)
