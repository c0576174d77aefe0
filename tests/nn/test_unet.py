"""The U-Net compared with diffusers' UNet2DConditionModel with the same random weights, and properties of its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gouache.nn.attention import GeGlu, attention
from gouache.nn.blocks import timestep_embedding
from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet

from .narrow import normal, scramble
from .narrow_unets import FAMILIES, unet_pair


@pytest.fixture(scope="module")
def pairs():
    return {name: unet_pair(*family) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("size", [(8, 8), (9, 13)], ids=["even", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_output_agrees_with_diffusers(pairs, family, size):
    ours, theirs = pairs[family]
    spec = ours.spec
    x, context = normal(2, 4, *size), normal(2, 7, spec.context_dim, seed=2)
    t = torch.tensor([981.0, 12.5])
    vector, added_conditions = None, {}
    if spec.vector_channels:
        # SDXL receives its pooled prompt and a few numbers: height, width, crop, target height and width (or a score).
        pooled = normal(2, 20, seed=3)
        ids = torch.tensor([[1024.0, 768, 0, 64, 512, 640], [96, 128, 3, 0, 1024, 6]])[:, : spec.vector_channels // 256]
        sinusoids = timestep_embedding(ids.flatten(), 256).reshape(2, -1)
        vector = torch.cat([pooled, sinusoids], dim=1)
        added_conditions = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    found = ours(x, t, context, vector)

    expected = theirs(x, t, context, **added_conditions).sample
    assert expected.std() > 0.1
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_more_input_channels_change_only_the_first_convolution():
    wide = scramble(UNet(UNetSpec(in_channels=9, channels=32, channel_mult=(1, 2), attention_depth=(1, 0))))
    narrow = UNet(UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0)))
    weights = dict(wide.state_dict())
    weights["input_blocks.0.0.weight"] = weights["input_blocks.0.0.weight"][:, :4]
    narrow.load_state_dict(weights)
    x, t, context = normal(1, 4, 8, 8), torch.tensor([500.0]), normal(1, 5, 768)

    found = wide(torch.cat([x, torch.zeros(1, 5, 8, 8)], dim=1), t, context)

    assert_close(found, narrow(x, t, context))


@torch.no_grad()
def test_each_row_of_a_batch_is_independent_of_the_others(pairs):
    ours, _ = pairs["sd1"]
    x, context, t = normal(3, 4, 8, 8), normal(3, 7, 24, seed=2), torch.tensor([1.0, 400.0, 999.0])

    together = ours(x, t, context)

    alone = torch.cat([ours(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_timestep_embedding_is_cosines_then_sines_of_falling_frequencies():
    found = timestep_embedding(torch.tensor([0.0, 1.0, 37.5]), 8)

    frequencies = [10000 ** (-k / 4) for k in range(4)]
    expected = [[math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies] for t in (0, 1, 37.5)]
    assert_close(found, torch.tensor(expected))


@torch.no_grad()
def test_the_feed_forward_is_gated_by_the_erf_gelu_of_the_second_half():
    layer = scramble(GeGlu(3, 5))
    x = normal(4, 3)

    found = layer(x)

    value, gate = (layer.proj.weight.double() @ x.double().T).T.add(layer.proj.bias.double()).split(5, dim=1)
    expected = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_its_definition_in_float64(causal):
    q, k, v = normal(2, 6, 12), normal(2, 6, 12, seed=2), normal(2, 6, 12, seed=3)

    found = attention(q, k, v, heads=3, causal=causal)

    expected = torch.empty(2, 6, 12, dtype=torch.float64)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = q[..., part].double() @ k[..., part].double().transpose(1, 2) / 2
        if causal:
            scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
        expected[..., part] = scores.softmax(-1) @ v[..., part].double()
    assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tokens", [48, 1100])
def test_bfloat16_attention_and_its_gradients_agree_with_float32(tokens: int):
    inputs = [normal(1, tokens, 16), normal(1, 77, 16, seed=2), normal(1, 77, 16, seed=3)]
    full, half = (
        [x.to(dtype, copy=True).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.bfloat16)
    )

    expected = F.scaled_dot_product_attention(*(x.unflatten(2, (2, 8)).transpose(1, 2) for x in full))
    expected = expected.transpose(1, 2).flatten(2)
    found = attention(*half, heads=2)
    expected.square().sum().backward()
    found.float().square().sum().backward()

    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    for a, b in zip(half, full):
        assert a.grad is not None and b.grad is not None
        assert (a.grad.float() - b.grad).norm() < 0.03 * b.grad.norm()


@pytest.mark.parametrize(("tokens", "others"), [(256, 256), (300, 1024), (1500, 257)])
def test_attention_in_blocks_is_the_attention_of_torch(tokens: int, others: int):
    """The blocks are used on some processors only, so they are called here by name."""
    from gouache.nn import attention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, tokens, 16, generator=generator)
    k, v = (torch.randn(2, 3, others, 16, generator=generator) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.no_grad():
        exact = attention._attention_in_blocks(q, k, v)
        rounded = attention._attention_in_blocks(q.bfloat16(), k.bfloat16(), v.bfloat16())

    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounded.float(), expected, atol=2e-2, rtol=2e-2)
