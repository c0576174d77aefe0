"""The contrastive loss compared with transformers' and with known values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, VisionSpec
from gouache.training.contrastive import Contrast, Pairs, Temperature


@pytest.fixture(scope="module")
def clip():
    """(our objective, transformers' CLIPModel) with the same random weights."""
    from transformers import CLIPConfig, CLIPModel

    text = {"heads": 2, "layers": 1, "width": 16, "mlp_width": 24}
    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    theirs = CLIPModel(
        CLIPConfig(
            text_config={
                **shared, "vocab_size": 12, "max_position_embeddings": 6,
                "bos_token_id": 10, "eos_token_id": 11, "pad_token_id": 11,
            },
            vision_config={**shared, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    ours = Contrast(
        ClipText(TextSpec(**text, vocabulary=12, positions=6, projection=8)),
        ClipVision(VisionSpec(**text, image_size=8, patch_size=4, projection=8)),
    )
    weights = theirs.state_dict()
    for network, names in ((ours.text, "text_"), (ours.vision, "vis")):
        network.load_state_dict(
            {k: v for k, v in weights.items() if k.startswith(names) and not k.endswith("position_ids")}
        )
    with torch.no_grad():
        ours.temperature.logit_scale.copy_(theirs.logit_scale)
    return ours, theirs


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 10, (5, 4), generator=generator)
    tokens = torch.cat([torch.full((5, 1), 10), words, torch.full((5, 1), 11)], dim=1)
    return Pairs(torch.randn(5, 3, 8, 8, generator=generator), tokens)


@torch.no_grad()
def test_loss_and_similarities_agree_with_transformers(clip):
    ours, theirs = clip
    batch = pairs()

    found = ours.losses(batch, 0)

    expected = theirs(input_ids=batch.tokens, pixel_values=batch.images, return_loss=True)
    logits = ours.temperature() * ours.similarities(ours.text(batch.tokens).pooled, batch.images)
    assert_close(logits, expected.logits_per_text, atol=1e-4, rtol=1e-4)
    assert_close(found["loss"], expected.loss, atol=1e-4, rtol=1e-4)
    correct = expected.logits_per_text.argmax(1) == torch.arange(5)
    assert_close(found["accuracy"], correct.float().mean())


@torch.no_grad()
def test_the_loss_of_equal_pairs_is_the_logarithm_of_the_batch_size(clip):
    ours, _ = clip
    batch = pairs()
    same = Pairs(batch.images[:1].expand(5, -1, -1, -1), batch.tokens[:1].expand(5, -1))

    assert_close(ours.losses(same, 0)["loss"], torch.tensor(math.log(5)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_temperature_starts_as_in_clip_and_is_at_most_100():
    temperature = Temperature()
    assert float(temperature()) == pytest.approx(1 / 0.07)

    temperature.logit_scale.fill_(50.0)

    assert float(temperature()) == pytest.approx(100)
