"""Adapter files are recognised by the tensor names in official lists and in files of the tools that write them."""

from __future__ import annotations

import pytest
from torch import nn

from gouache.layouts.adapters import read_adapter, read_embedding, read_hypernetwork

from .manifests import manifest, shapes

peft = pytest.importorskip("peft", reason="an independent writer of adapter files")


@pytest.mark.parametrize(
    ("name", "kind", "modules", "context", "blocks"),
    [  # module counts of the tool that wrote the files
        ("lora_kohya_sd15", "lora", {"text_encoder": 72, "unet": 192}, 768, "diffusers"),
        ("locon_kohya_sd15", "locon", {"text_encoder": 72, "unet": 278}, 768, "diffusers"),
        ("lora_kohya_sdxl", "lora", {"text_encoder": 72, "text_encoder_2": 192, "unet": 722}, 2048, "original"),
    ],
)
def test_kohya_files_are_recognised_and_their_modules_counted(name, kind, modules, context, blocks):
    found = read_adapter(shapes(name))

    assert found is not None
    assert (found.kind, found.base, found.context_dim, found.block_names) == (kind, kind, context, blocks)
    assert found.modules == modules
    assert found.unnamed == ()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = nn.ModuleDict({"to_q": nn.Linear(64, 64), "to_k": nn.Linear(768, 64)})


def saved_by_peft(config):
    """Names and shapes of an adapter of a U-Net's attention as PEFT saves it, with diffusers' prefix."""
    model = peft.get_peft_model(nn.ModuleDict({"down_blocks": nn.ModuleList([Attention()])}), config)
    state = peft.get_peft_model_state_dict(model)
    return {"unet." + name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in state.items()}


TO = ["to_q", "to_k"]


@pytest.mark.parametrize(
    ("config", "kind", "base"),
    [
        (peft.LoraConfig(r=4, target_modules=TO), "lora", "lora"),
        (peft.LoraConfig(r=4, target_modules=TO, use_dora=True), "dora", "lora"),
        (peft.LoHaConfig(r=4, target_modules=TO), "loha", "loha"),
        (peft.LoKrConfig(r=4, target_modules=TO), "lokr", "lokr"),
    ],
)
def test_adapters_saved_by_peft_are_recognised(config, kind, base):
    found = read_adapter(saved_by_peft(config))

    assert found is not None
    assert (found.kind, found.base) == (kind, base)
    assert found.modules == {"unet": 2}
    assert found.context_dim == 768
    assert found.unnamed == ()


def test_older_diffusers_names_are_recognised():
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    found = read_adapter(
        {
            f"unet.{stem}.processor.to_k_lora.down.weight": (4, 768),
            f"unet.{stem}.processor.to_k_lora.up.weight": (320, 4),
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": (4, 768),
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (768, 4),
        }
    )

    assert found is not None
    assert found.kind == "lora"
    assert found.modules == {"text_encoder": 1, "unet": 1}
    assert found.context_dim == 768


def test_a_lora_with_a_tucker_core_is_a_locon():
    kohya = {key: shape for key, shape in shapes("lora_kohya_sd15").items() if "_attn2_" in key}

    found = read_adapter(kohya | {"lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": (4, 4, 3, 3)})

    assert found is not None
    assert found.kind == "locon"


def test_embeddings_bundled_with_a_lora_are_reported():
    lora = shapes("lora_kohya_sdxl")

    found = read_adapter(lora | {"bundle_emb.mycat.clip_l": (2, 768), "bundle_emb.mycat.clip_g": (2, 1280)})

    assert found is not None
    assert found.kind == "lora"
    assert found.embeddings == ("mycat",)
    assert found.unnamed == ()


@pytest.mark.parametrize("name", ["sd15_emaonly", "sdxl_base", "sdxl_vae", "svd"])
def test_models_are_not_recognised_as_adapters(name):
    official = shapes(name)

    assert read_adapter(official) is None
    assert read_embedding(official, {}) is None
    assert read_hypernetwork(official) is None


@pytest.mark.parametrize(
    ("tensors", "extra", "form", "vectors", "widths"),
    [  # the formats of the ti_embeddings list
        ({"string_to_param.*": (5, 768)}, {"string_to_token": {"*": 265}}, "A1111", 5, {"text_encoder": 768}),
        (
            {"string_to_param.cat": (1024,), "string_to_token.cat": ()},
            {},
            "textual inversion",
            1,
            {"text_encoder": 1024},
        ),
        ({"<cat-toy>": (768,)}, {}, "diffusers", 1, {"text_encoder": 768}),
        ({"<cat-toy>": (4, 1024)}, {}, "diffusers", 4, {"text_encoder": 1024}),
        ({"emb_params": (8, 768)}, {}, "emb_params", 8, {"text_encoder": 768}),
        (
            {"clip_g": (3, 1280), "clip_l": (3, 768)},
            {},
            "clip_g and clip_l",
            3,
            {"text_encoder": 768, "text_encoder_2": 1280},
        ),
        ({"clip_g": (3, 1280)}, {}, "clip_g", 3, {"text_encoder_2": 1280}),
    ],
)
def test_every_format_of_textual_inversion_is_recognised(tensors, extra, form, vectors, widths):
    found = read_embedding(tensors, extra)

    assert found is not None
    assert (found.format, found.vectors, found.widths) == (form, vectors, widths)


def test_hypernetworks_are_recognised_by_their_numbered_pairs():
    examples = manifest("a1111_hypernetwork")["examples"]
    layers = {key: tuple(value[0]) for key, value in examples["default_768"].items()}

    tensors = {
        f"{width}.{side}.{key}": shape for width in (320, 768) for side in (0, 1) for key, shape in layers.items()
    }

    assert read_hypernetwork(tensors) == (320, 768)
    assert read_hypernetwork(tensors | {"other.weight": (1,)}) is None
