"""Control residuals, image tokens and the shared encoder, compared with diffusers' ControlNet and IP-Adapter."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gouache.errors import ModelError
from gouache.nn.attention import CrossAttention, ImageProjections
from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from gouache.nn.unet_encoder import UNetEncoder

from .narrow import normal, scramble
from .narrow_unets import FAMILIES, SD1, SD2, SDXL, unet_pair

KEYS = Path(__file__).parent.parent / "keys"


@pytest.fixture(scope="module")
def pairs():
    return {"sd1": unet_pair(*SD1), "sd2": unet_pair(*SD2), "sdxl": unet_pair(*SDXL)}


def inputs(spec: UNetSpec, size: tuple[int, int] = (8, 8)):
    x, t, context = normal(2, 4, *size), torch.tensor([981.0, 12.5]), normal(2, 7, spec.context_dim, seed=2)
    return x, t, context, normal(2, spec.vector_channels, seed=3) if spec.vector_channels else None


def added_conditions(spec: UNetSpec) -> tuple[torch.Tensor | None, dict]:
    """SDXL's pooled prompt and size numbers, as our vector and as diffusers' keyword."""
    if not spec.vector_channels:
        return None, {}
    from gouache.nn.blocks import timestep_embedding

    pooled, ids = normal(2, 20, seed=3), torch.tensor([[1024.0, 768, 0, 64, 512, 640], [96, 128, 3, 0, 1024, 6]])
    vector = torch.cat([pooled, timestep_embedding(ids.flatten(), 256).reshape(2, -1)], dim=1)
    return vector, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def residuals(unet: UNet, x, t, context, vector) -> list[torch.Tensor]:
    """Random residuals of the shapes that a ControlNet for `unet` gives."""
    with torch.no_grad():
        skips, middle = unet.encode(x, unet.embed(t, vector, x.dtype), context)
    return [0.5 * normal(*output.shape, seed=20 + index) for index, output in enumerate([*skips, middle])]


def projections(unet: UNet, width: int, seed: int = 0, **options) -> dict[str, ImageProjections]:
    """A random adapter for every cross-attention."""
    made = {}
    for index, (name, layer) in enumerate(unet.named_modules()):
        if name.endswith("attn2"):
            to_k, to_v = (torch.nn.Linear(width, layer.to_q.out_features, bias=False) for _ in range(2))
            scramble(to_k, seed + 2 * index), scramble(to_v, seed + 2 * index + 1)
            made[name] = ImageProjections(to_k, to_v, **options)
    return made


def attach(unet: UNet, made: dict[str, ImageProjections]) -> None:
    for name, each in made.items():
        unet.get_submodule(name).attach_image_projections(each)


def detach(unet: UNet, made: dict[str, ImageProjections]) -> None:
    for name, each in made.items():
        unet.get_submodule(name).detach_image_projections(each)


@pytest.mark.parametrize("size", [(8, 8), (9, 13)], ids=["even", "odd"])
@pytest.mark.parametrize(("family", "count"), [("sd1", 13), ("sd2", 13), ("sdxl", 10)])
@torch.no_grad()
def test_control_residuals_agree_with_diffusers(pairs, family, count, size):
    ours, theirs = pairs[family]
    x, t, context, _ = inputs(ours.spec, size)
    vector, options = added_conditions(ours.spec)
    control = residuals(ours, x, t, context, vector)
    assert len(control) == count

    found = ours(x, t, context, vector, control=control)

    expected = theirs(
        x,
        t,
        context,
        down_block_additional_residuals=control[:-1],
        mid_block_additional_residual=control[-1],
        **options,
    ).sample
    assert (expected - ours(x, t, context, vector)).std() > 0.05
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_controlnet_on_the_shared_encoder_agrees_with_diffusers(pairs):
    from diffusers import ControlNetModel

    ours, theirs = pairs["sd1"]
    their_control = ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=(8, 16, 32, 32))
    scramble(their_control.controlnet_cond_embedding)
    scramble(their_control.controlnet_down_blocks, 1), scramble(their_control.controlnet_mid_block, 2)
    encoder = UNetEncoder(ours.spec)
    encoder.load_state_dict({key: tensor for key, tensor in ours.state_dict().items() if key in encoder.state_dict()})
    x, t, context, _ = inputs(ours.spec)
    picture = normal(2, 3, 64, 64, seed=9)
    hint = their_control.controlnet_cond_embedding(picture)

    skips, middle = encoder.encode(x, encoder.embed(t, None, x.dtype), context, hint=hint)

    zero_convs = [*their_control.controlnet_down_blocks, their_control.controlnet_mid_block]
    control = [convolution(output) for convolution, output in zip(zero_convs, [*skips, middle], strict=True)]
    down, mid = their_control(x, t, context, picture, return_dict=False)
    for found, expected in zip(control, [*down, mid], strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected = theirs(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert_close(ours(x, t, context, control=control), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_control_or_attached_projections_the_output_is_bit_identical(family):
    unet = scramble(UNet(FAMILIES[family][0]))
    x, t, context, vector = inputs(unet.spec)
    plain = unet(x, t, context, vector)
    tokens = normal(2, 4, unet.spec.context_dim, seed=5)

    assert torch.equal(unet(x, t, context, vector, control=None, image_tokens=None), plain)
    assert torch.equal(unet(x, t, context, vector, image_tokens=tokens), plain)

    made = projections(unet, unet.spec.context_dim)
    attach(unet, made)
    assert torch.equal(unet(x, t, context, vector), plain)  # attached, but no tokens
    assert not torch.equal(unet(x, t, context, vector, image_tokens=tokens), plain)
    for each in made.values():
        each.strength = 0.0
    assert torch.equal(unet(x, t, context, vector, image_tokens=tokens), plain)
    detach(unet, made)
    assert torch.equal(unet(x, t, context, vector, image_tokens=tokens), plain)


@torch.no_grad()
def test_residuals_of_zero_change_nothing(pairs):
    unet, _ = pairs["sd1"]
    given = inputs(unet.spec)
    zeros = [torch.zeros_like(each) for each in residuals(unet, *given)]

    assert torch.equal(unet(*given, control=zeros), unet(*given))


@torch.no_grad()
def test_residuals_that_do_not_fit_are_one_line_errors(pairs):
    unet, _ = pairs["sd1"]
    given = inputs(unet.spec)
    control = residuals(unet, *given)

    with pytest.raises(ModelError, match=r"^received 10 control residuals, expected 13: [^\n]*$"):
        unet(*given, control=control[:10])
    with pytest.raises(ModelError, match=r"^the control residual for input block 3 has shape \(1, [^\n]*$"):
        unet(*given, control=[*control[:3], control[3][:1], *control[4:]])
    with pytest.raises(ModelError, match=r"^the control residual for the middle block has shape [^\n]*$"):
        unet(*given, control=[*control[:-1], control[-1][:, :1]])


@torch.no_grad()
def test_image_tokens_of_another_batch_are_a_one_line_error(pairs):
    unet, _ = pairs["sd1"]

    for tokens in (normal(1, 4, 24), normal(4, 24)):
        with pytest.raises(
            ModelError, match=r"^the image tokens have shape \(.*\), expected \(2, tokens, width\)[^\n]*$"
        ):
            unet(*inputs(unet.spec), image_tokens=tokens)


@pytest.mark.parametrize("strength", [1.0, 0.35])
@torch.no_grad()
def test_image_tokens_agree_with_the_ip_adapter_of_diffusers(strength):
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    theirs = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8)
    processor = IPAdapterAttnProcessor2_0(32, 24, num_tokens=(4, 16), scale=[strength, 0.7])
    theirs.set_processor(processor)
    scramble(theirs)
    ours = CrossAttention(32, 24, heads=4)
    ours.load_state_dict({key: tensor for key, tensor in theirs.state_dict().items() if "processor" not in key})
    ours.attach_image_projections(ImageProjections(processor.to_k_ip[0], processor.to_v_ip[0], strength, slice(0, 4)))
    ours.attach_image_projections(ImageProjections(processor.to_k_ip[1], processor.to_v_ip[1], 0.7, slice(4, 20)))
    x, context, tokens = normal(2, 30, 32), normal(2, 7, 24, seed=2), normal(2, 20, 24, seed=3)

    found = ours(x, context, tokens)

    expected = theirs(x, (context, [tokens[:, :4], tokens[:, 4:]]))
    assert (expected - ours(x, context)).std() > 0.05
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_image_tokens_reach_every_cross_attention_and_no_self_attention(pairs):
    unet, _ = pairs["sdxl"]
    given, tokens = inputs(unet.spec), normal(2, 4, 48, seed=5)
    received = []
    handles = [
        layer.register_forward_hook(
            lambda layer, args, out, name=name: received.append((name, len(args) > 2 and args[2] is tokens))
        )
        for name, layer in unet.named_modules()
        if isinstance(layer, CrossAttention)
    ]

    unet(*given, image_tokens=tokens)

    for handle in handles:
        handle.remove()
    assert len(received) == 2 * sum(name.endswith("attn2") for name, _ in received)
    assert all(has == name.endswith("attn2") for name, has in received)


def test_attached_projections_are_not_part_of_the_network():
    unet = UNet(UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0), heads=4, context_dim=24))
    keys, parameters = list(unet.state_dict()), len(list(unet.parameters()))

    attach(unet, projections(unet, 24))

    assert list(unet.state_dict()) == keys
    assert len(list(unet.parameters())) == parameters


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradients_flow_through_residuals_tokens_and_projections(pairs, family):
    unet, _ = pairs[family]
    given = inputs(unet.spec)
    control = [each.requires_grad_() for each in residuals(unet, *given)]
    tokens = normal(2, 4, unet.spec.context_dim, seed=5).requires_grad_()
    made = projections(unet, unet.spec.context_dim)
    attach(unet, made)
    try:
        loss = unet(*given, control=control, image_tokens=tokens).square().mean()
        weights = [weight for each in made.values() for weight in (each.to_k_ip.weight, each.to_v_ip.weight)]
        gradients = torch.autograd.grad(loss, [*control, tokens, *weights])
        with torch.inference_mode():
            again = unet(*given, control=control, image_tokens=tokens).square().mean()
    finally:
        detach(unet, made)

    assert all(torch.isfinite(each).all() and each.abs().max() > 0 for each in gradients)
    assert_close(again, loss.detach())


def test_the_shared_encoder_has_the_names_and_shapes_of_a_controlnet_file():
    """`tool_add_control.py` of the ControlNet authors copies these tensors of SD1 to `control_model.`."""
    manifest = json.loads(gzip.decompress((KEYS / "sd15_emaonly.json.gz").read_bytes()))
    prefix = "model.diffusion_model."
    shared = ("time_embed.", "input_blocks.", "middle_block.")
    expected = {
        key.removeprefix(prefix): tuple(shape)
        for key, (shape, _) in manifest.items()
        if key.removeprefix(prefix).startswith(shared)
    }

    with torch.device("meta"):
        encoder = UNetEncoder(UNetSpec())

    assert {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()} == expected
    # The published files have 340 tensors: these, 13 zero convolutions and the 8 layers of the hint, 2 tensors each.
    assert len(expected) + 2 * (13 + 8) == 340
    assert encoder.skip_channels == (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280)
