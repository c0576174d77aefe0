"""The image encoder's tables, compared with the official key list; Transformers' encoder compared with OpenCLIP's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gouache.layouts.rules import invert, plan, prove
from gouache.layouts.vision import OPENCLIP_VISION, TRANSFORMERS_VISION, vision_layout

from .manifests import shapes
from .svd_names import pairs

VISUAL = "conditioner.embedders.0.open_clip.model.visual."


def transformers_tower(**changes: int) -> CLIPVisionModelWithProjection:
    sizes: dict[str, Any] = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
    sizes |= {"intermediate_size": 5120, "image_size": 224, "projection_dim": 1024} | changes
    return CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_act="gelu", **sizes))


def test_the_official_names_map_to_transformers_names_and_back():
    official = shapes("svd", VISUAL)
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in transformers_tower().state_dict().items()}

    there = {name: origin.shape(official) for name, origin in prove(OPENCLIP_VISION, official).origins.items()}

    assert there == theirs
    back = {name: origin.shape(theirs) for name, origin in prove(invert(OPENCLIP_VISION), theirs).origins.items()}
    assert back == official


def test_names_with_equal_shapes_map_as_in_the_list_of_pairs():
    stated = pairs(VISUAL, "image_encoder")

    there = plan(OPENCLIP_VISION, stated).origins

    assert {origin.sources[0]: name for name, origin in there.items()} == stated


class OpenClipBlock(nn.Module):
    """A block of OpenCLIP's image encoder, with torch's fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        for name, layer in {"c_fc": nn.Linear(width, 96), "gelu": nn.GELU(), "c_proj": nn.Linear(96, width)}.items():
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(nn.Module):
    """OpenCLIP's VisionTransformer: a class token before the patches; its output is projected by a matrix."""

    def __init__(self, width: int, heads: int, layers: int, projection: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 14, stride=14, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(5, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*(OpenClipBlock(width, heads) for _ in range(layers)))}
        )
        self.proj = nn.Parameter(torch.zeros(width, projection))

    def forward(self, picture: Tensor) -> Tensor:
        x = self.conv1(picture).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


def test_both_encoders_give_the_same_output_with_the_same_weights():
    generator = torch.Generator().manual_seed(0)
    ours = OpenClipTower(width=64, heads=4, layers=2, projection=48).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tensors = ours.state_dict()
    theirs = transformers_tower(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=28,
        projection_dim=48,
    ).eval()  # fmt: skip
    theirs.load_state_dict(
        {name: origin.tensor(tensors.__getitem__) for name, origin in plan(OPENCLIP_VISION, tensors).origins.items()}
    )
    picture = torch.randn(2, 3, 28, 28, generator=generator)

    with torch.no_grad():
        torch.testing.assert_close(theirs(picture).image_embeds, ours(picture), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["openclip", "transformers", "neither"])
def test_the_layout_is_recognised_by_its_names(names):
    listed = {
        "openclip": list(shapes("svd", VISUAL)),
        "transformers": ["visual_projection.weight", "vision_model.embeddings.position_ids"],
        "neither": ["visual_projection.weight", "trunk.blocks.0.attn.qkv.weight"],
    }[names]

    found = vision_layout(listed)

    assert (found[0] if found else "neither") == names


def test_position_ids_are_dropped_and_the_rest_kept():
    names = ["vision_model.embeddings.position_ids", "vision_model.pre_layrnorm.weight", "visual_projection.weight"]

    found = plan(TRANSFORMERS_VISION, names)

    assert (set(found.dropped), set(found.origins), found.unnamed) == ({names[0]}, set(names[1:]), ())
