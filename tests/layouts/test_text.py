"""OpenCLIP's names, compared with the official key lists, with torch's fused attention, and with transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gouache.layouts.original import text_shapes
from gouache.layouts.rules import Drop, invert, plan, prove
from gouache.layouts.text import BARE, OPENCLIP, TRANSFORMERS, text_layout
from gouache.nn.spec import TextSpec

from .manifests import folder_shapes, shapes

H = TextSpec(width=1024, layers=24, heads=16, mlp_width=4096, projection=1024)
BIGG = TextSpec(width=1280, layers=32, heads=20, mlp_width=5120, projection=1280)


@pytest.mark.parametrize(
    ("file", "prefix", "spec"),
    [
        ("sd21_768_v", "cond_stage_model.model.", H),
        ("sdxl_base", "conditioner.embedders.1.model.", BIGG),
        ("sdxl_refiner", "conditioner.embedders.0.model.", BIGG),
    ],
)
def test_official_openclip_names_map_to_transformers_names_and_back(file, prefix, spec):
    official = shapes(file, prefix)

    found = prove(OPENCLIP, official)

    assert {name: origin.shape(official) for name, origin in found.origins.items()} == text_shapes(spec)
    assert found.dropped.keys() == {"logit_scale"}


def test_the_official_single_file_and_folder_give_the_same_second_encoder():
    file = shapes("sdxl_base", "conditioner.embedders.1.model.")
    folder = folder_shapes("diffusers_sdxl_base", "text_encoder_2")

    from_file = {name: origin.shape(file) for name, origin in plan(OPENCLIP, file).origins.items()}
    from_folder = {name: origin.shape(folder) for name, origin in prove(TRANSFORMERS, folder).origins.items()}

    assert from_file == from_folder


def openclip(width, layers, projection, seed=0):
    """Random tensors under OpenCLIP's names: a narrow text encoder of `open_clip.model.CLIP`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "token_embedding.weight": (20, width),
        "positional_embedding": (7, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, projection),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        attention = nn.MultiheadAttention(width, 1)
        shapes |= {f"{block}.attn.{name}": tuple(t.shape) for name, t in attention.state_dict().items()}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * width, width), f"{block}.mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def moved(tensors, rules=OPENCLIP):
    return {name: origin.tensor(tensors.__getitem__) for name, origin in plan(rules, tensors).origins.items()}


def test_split_attention_gives_the_same_output_as_fused_attention():
    width, heads = 32, 4
    tensors = openclip(width, 1, 8)
    block, layer = "transformer.resblocks.0.attn.", "text_model.encoder.layers.0.self_attn."
    fused = nn.MultiheadAttention(width, heads, batch_first=True)
    fused.load_state_dict({name.removeprefix(block): t for name, t in tensors.items() if name.startswith(block)})
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    new = moved(tensors)

    def project(part, y):
        return F.linear(y, new[f"{layer}{part}.weight"], new[f"{layer}{part}.bias"])

    q, k, v = (project(f"{part}_proj", x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
    split = project("out_proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert torch.allclose(split, fused(x, x, x, need_weights=False)[0], atol=1e-6)


def test_the_projection_is_transposed_for_a_linear_layer():
    tensors = openclip(32, 1, 8)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))

    projected = F.linear(x, moved(tensors)["text_projection.weight"])

    assert torch.allclose(projected, x @ tensors["text_projection"], atol=1e-6)


def test_the_conversion_in_diffusers_gives_the_same_tensors():
    width = 32  # diffusers splits by the projection's rows, so it needs a square one
    tensors = openclip(width, 3, width)
    config = CLIPTextConfig(hidden_size=width)

    theirs = convert_open_clip_checkpoint(
        type("Model", (), {"config": config}), {f"x.{name}": tensor for name, tensor in tensors.items()}, prefix="x."
    )
    ours = moved(tensors)

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_inverse_table_restores_the_tensors():
    tensors = openclip(32, 2, 8)

    restored = moved(moved(tensors), invert(OPENCLIP))

    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("model", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("prefixed", [True, False])
def test_files_saved_by_transformers_are_read_with_and_without_the_prefix(model, prefixed):
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=50000,
        max_position_embeddings=12,
        projection_dim=48,
    )
    with torch.device("meta"):
        saved = {name: tuple(tensor.shape) for name, tensor in model(config).state_dict().items()}
    bare = {name.removeprefix("text_model."): shape for name, shape in saved.items()}
    names = (
        {(f"text_model.{n}" if not n.startswith("text_proj") else n): s for n, s in bare.items()} if prefixed else bare
    )
    layout = text_layout(names)
    assert layout is not None

    found = prove(layout[1], names)

    projection = 48 if model is CLIPTextModelWithProjection else None
    spec = TextSpec(width=64, layers=2, mlp_width=96, vocabulary=50000, positions=12, projection=projection)
    assert {name: origin.shape(names) for name, origin in found.origins.items()} == text_shapes(spec)


def test_position_ids_are_dropped_with_a_reason_in_both_transformers_layouts():
    for rules, name in ((TRANSFORMERS, "text_model.embeddings.position_ids"), (BARE, "embeddings.position_ids")):
        found = plan(rules, [name])

        assert not found.origins
        assert found.dropped[name]


def test_every_drop_has_a_reason():
    for rules in (OPENCLIP, TRANSFORMERS, BARE):
        assert all(rule.reason for rule in rules if isinstance(rule, Drop))


def test_names_of_other_networks_have_no_text_layout():
    assert text_layout(shapes("sdxl_vae")) is None
    assert text_layout(shapes("sd15_emaonly", "model.diffusion_model.")) is None
