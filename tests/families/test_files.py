"""Identification of files on disk, written by the libraries that write users' files."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder


def test_textual_inversions_saved_by_torch_are_identified(tmp_path):
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(3, 768))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": vectors, "name": "cat", "step": 9}, tmp_path / "a.pt")
    torch.save({"<cat>": torch.zeros(1024)}, tmp_path / "learned_embeds.bin")
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, tmp_path / "xl.safetensors")

    found = {path.name: identify(open_model(path)) for path in tmp_path.iterdir()}

    assert {f.kind.value for f in found.values()} == {"embedding"}
    families = {name: f.family.value.name for name, f in found.items() if f.family.value}
    assert families == {"a.pt": "sd1", "learned_embeds.bin": "sd2", "xl.safetensors": "sdxl"}


def test_a_hypernetwork_saved_by_torch_is_identified(tmp_path):
    def layers(width):
        return {"linear.0.weight": torch.zeros(2 * width, width), "linear.1.weight": torch.zeros(width, 2 * width)}

    torch.save(
        {320: (layers(320), layers(320)), 768: (layers(768), layers(768)), "layer_structure": [1, 2, 1]},
        tmp_path / "style.pt",
    )

    found = identify(open_model(tmp_path / "style.pt"))

    assert found.kind.value == "hypernetwork"
    assert found.family.value is not None and found.family.value.name == "sd1"


UNET = UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0), res_blocks=1, context_dim=64)
VAE = VaeSpec(channels=32, channel_mult=(1, 2), res_blocks=1)
TEXT = TextSpec(width=64, layers=2, heads=1, mlp_width=96, vocabulary=99, positions=12)
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_the_networks_of_a_complete_narrow_model_are_loaded_from_the_file(tmp_path, suffix):
    networks = {"unet": UNet(UNET), "vae": Autoencoder(VAE), "text_encoder": ClipText(TEXT)}
    tensors = {PREFIXES[part] + name: t for part, net in networks.items() for name, t in net.state_dict().items()}
    path = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 5}, path)
    else:
        save_file(tensors, path)
    file = open_model(path)

    found = identify(file)

    assert found.kind.value == "checkpoint"
    assert (found.missing, found.unknown) == ({}, ())
    for part, network in networks.items():
        component = found.component(part)
        loaded = {name: origin.tensor(file.tensor) for name, origin in component.origins.items()}
        assert component.spec == network.spec
        assert loaded.keys() == network.state_dict().keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


def test_a_folder_saved_by_diffusers_loads_into_networks_of_the_right_specs(tmp_path):
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,
        sample_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    )
    config = CLIPTextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    for name, model in (("unet", unet), ("vae", vae), ("text_encoder", CLIPTextModel(config))):
        model.save_pretrained(tmp_path / name)
    index = {"unet": ["diffusers", ""], "vae": ["diffusers", ""], "text_encoder": ["transformers", ""]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    file = open_model(tmp_path)

    found = identify(file)

    assert (found.missing, found.unknown) == ({}, ())
    assert found.component("unet").spec == UNetSpec(
        channels=32, channel_mult=(1, 2), attention_depth=(1, 0), res_blocks=1, context_dim=64, heads=2
    )
    assert found.latent_scale is not None and found.latent_scale.value == 0.5
    assert found.size is not None and found.size.value == (32, 32)
    for part, kind in (("unet", UNet), ("vae", Autoencoder), ("text_encoder", ClipText)):
        component = found.component(part)
        with torch.device("meta"):
            network = kind(component.spec)
        loaded = {name: origin.tensor(file.tensor) for name, origin in component.origins.items()}
        network.load_state_dict(loaded, strict=True, assign=True)
