"""CLIP's two towers compared with transformers with the same random weights, at every layer, and special cases."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gouache.errors import ModelError
from gouache.layouts.rules import plan
from gouache.layouts.text import text_layout
from gouache.nn.clip import activate
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, VisionSpec

from .narrow import normal, scramble

BEGIN, END = 98, 99
NARROW = {"width": 64, "layers": 4, "heads": 4, "mlp_width": 96, "vocabulary": 100}

# A short prompt padded with the end token, like CLIP-L; one padded with 0, like OpenCLIP; and one without padding.
TOKENS = torch.tensor(
    [
        [BEGIN, 5, 6, END, END, END, END, END],
        [BEGIN, 7, END, 0, 0, 0, 0, 0],
        [BEGIN, 1, 2, 3, 4, 5, 6, END],
    ]
)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def towers(request):
    """(ours, theirs) with equal weights: as CLIP-L (quick GELU, no projection) and OpenCLIP (erf GELU, projection)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projection = 40 if request.param == "gelu" else None
    spec = TextSpec(**NARROW, activation=request.param, projection=projection)
    config = CLIPTextConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.mlp_width,
        hidden_act=spec.activation,
        projection_dim=40,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
    )
    theirs = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    scramble(theirs)
    ours = ClipText(spec)
    ours.load_state_dict(in_our_names(theirs.state_dict()))
    return ours.eval(), theirs


def in_our_names(weights):
    """Older versions of transformers have the prefix `text_model.`, newer ones do not: the names decide the layout."""
    found = text_layout(weights)
    assert found is not None
    return {name: origin.tensor(weights.__getitem__) for name, origin in plan(found[1], weights).origins.items()}


@torch.no_grad()
def test_every_layer_agrees_with_transformers(towers):
    ours, theirs = towers

    found = ours(TOKENS)

    expected = theirs(TOKENS, output_hidden_states=True).hidden_states
    assert len(found.layers) == len(expected) == 5
    for layer, hidden in zip(found.layers, expected):
        assert_close(layer, hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("skip", [1, 2, 3, 4])
@torch.no_grad()
def test_every_clip_skip_agrees_with_transformers(towers, skip):
    ours, theirs = towers
    inner = getattr(theirs, "text_model", theirs)

    found = ours(TOKENS)

    # Clip skip 1 is the last layer: its output after the final norm is the model's last hidden state.
    expected = theirs(TOKENS, output_hidden_states=True)
    normed = inner.final_layer_norm(expected.hidden_states[-skip])
    assert_close(ours.norm(found.layers[-skip]), normed, atol=1e-4, rtol=1e-4)
    if skip == 1:
        assert_close(found.last, expected.last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_pooled_vector_agrees_with_transformers_for_every_padding(towers):
    ours, theirs = towers

    pooled = ours(TOKENS).pooled

    expected = theirs(TOKENS)
    expected = expected.text_embeds if ours.spec.projection else expected.pooler_output
    assert expected.std() > 0.1
    assert_close(pooled, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_given_vectors_replace_the_token_embeddings(towers):
    ours, _ = towers
    others = torch.where((TOKENS == BEGIN) | (TOKENS == END), TOKENS, 50)

    given = ours(others, ours.embed(TOKENS))

    assert torch.equal(given.last, ours(TOKENS).last)
    assert torch.equal(given.pooled, ours(TOKENS).pooled)


@torch.no_grad()
def test_a_token_does_not_affect_earlier_positions(towers):
    ours, _ = towers
    changed = TOKENS.clone()
    changed[:, 5:] = 42

    before, after = ours(TOKENS).last, ours(changed).last

    assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=0.01)


@torch.no_grad()
def test_padding_with_end_tokens_and_with_zeros_gives_the_same_pooled_vector(towers):
    ours, _ = towers
    with_end = torch.tensor([[BEGIN, 7, END, END, END, END]])
    with_zeros = torch.tensor([[BEGIN, 7, END, 0, 0, 0]])

    assert_close(ours(with_end).pooled, ours(with_zeros).pooled)


@torch.no_grad()
def test_a_tower_without_its_last_layer_gives_the_output_of_clip_skip_two():
    """diffusers files have 23 of SD2's 24 layers, single files have all: both must encode prompts alike."""
    whole = scramble(ClipText(TextSpec(**NARROW, activation="gelu")))
    short = ClipText(TextSpec(**{**NARROW, "layers": 3}, activation="gelu"))
    short.load_state_dict({name: value for name, value in whole.state_dict().items() if ".layers.3." not in name})

    assert_close(short(TOKENS).last, whole.norm(whole(TOKENS).layers[-2]))


def test_the_two_activations_equal_their_formulas():
    x = torch.linspace(-6, 6, 49, dtype=torch.float64)

    assert_close(activate(x, "quick_gelu"), x / (1 + torch.exp(-1.702 * x)))
    assert_close(activate(x, "gelu"), 0.5 * x * (1 + torch.erf(x / 2**0.5)))


@pytest.mark.parametrize("name", ["gelu_new", "QuickGELU", ""])
def test_an_unknown_activation_is_refused(name):
    with pytest.raises(ModelError, match="quick_gelu"):
        ClipText(TextSpec(**NARROW, activation=name))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_the_image_tower_agrees_with_transformers(activation):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    spec = VisionSpec(
        width=48, layers=3, heads=4, mlp_width=80, image_size=20, patch_size=5, activation=activation, projection=24
    )
    config = CLIPVisionConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        image_size=20,
        patch_size=5,
        hidden_act=activation,
        projection_dim=24,
    )
    theirs = CLIPVisionModelWithProjection(config)
    scramble(theirs)
    ours = ClipVision(spec)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    image = normal(2, 3, 20, 20)

    found = ours(image)

    expected = theirs(image, output_hidden_states=True)
    assert expected.image_embeds.std() > 0.1
    assert_close(found.pooled, expected.image_embeds, atol=1e-4, rtol=1e-4)
    for layer, hidden in zip(found.layers, expected.hidden_states, strict=True):
        assert_close(layer, hidden, atol=1e-4, rtol=1e-4)
