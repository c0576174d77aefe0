"""Module names in adapter files: every official name is found, and no name means two modules."""

from __future__ import annotations

import pytest

from gouache.families.sd import SD1, SD2
from gouache.families.sdxl import SDXL
from gouache.layouts.adapters import suffix_of
from gouache.layouts.modules import kohya_names, module_names, peft_names
from gouache.layouts.original import text_shapes, unet_shapes
from gouache.nn.spec import TextSpec, UNetSpec
from tests.layouts.manifests import shapes
from tests.layouts.test_original_video import UNET as VIDEO

LINES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def specs(line: str) -> dict[str, UNetSpec | TextSpec]:
    return {p.component: p.spec for p in LINES[line].locations if isinstance(p.spec, UNetSpec | TextSpec)}


@pytest.mark.parametrize(
    ("manifest", "line"), [("lora_kohya_sd15", "sd1"), ("locon_kohya_sd15", "sd1"), ("lora_kohya_sdxl", "sdxl")]
)
def test_every_module_of_an_official_file_is_found_once(manifest: str, line: str):
    names = module_names(specs(line))
    stems = {name.removesuffix(suffix_of(name)) for name in shapes(manifest)}

    modules = [module for stem in stems for module in names[stem]]

    assert len(set(modules)) == len(stems)
    official = kohya_names(specs(line), line == "sdxl")
    assert {official[module] for module in modules} == stems


@pytest.mark.parametrize("line", LINES)
def test_every_alias_maps_to_an_existing_module(line: str):
    networks = specs(line)
    exist = {
        (component, name.removesuffix(".weight"))
        for component, spec in networks.items()
        for name in (unet_shapes(spec) if isinstance(spec, UNetSpec) else text_shapes(spec))
        if name.endswith(".weight")
    }
    names = module_names(networks)

    assert {module for modules in names.values() for module in modules} == exist
    for naming in (peft_names(networks), kohya_names(networks, True), kohya_names(networks, False)):
        assert naming.keys() == exist and len(set(naming.values())) == len(exist)
        assert all(names[name] == (module,) for module, name in naming.items())


def test_names_that_occur_in_files_are_found():
    names = module_names(specs("sd1"))
    query = ("unet", "input_blocks.1.1.transformer_blocks.0.attn1.to_q")

    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ):
        assert names[name] == (query,)
    out = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    assert names[out] == (("unet", "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"),)


@pytest.mark.parametrize("line", ["sd2", "sdxl"])
def test_openclip_names_and_its_fused_projection_are_found(line: str):
    component, prefix = ("text_encoder", "lora_te_") if line == "sd2" else ("text_encoder_2", "lora_te2_")
    names = module_names(specs(line))
    layer = "text_model.encoder.layers.3"

    assert names[f"{prefix}model_transformer_resblocks_3_attn_in_proj"] == tuple(
        (component, f"{layer}.self_attn.{part}_proj") for part in "qkv"
    )
    assert names[f"{prefix}transformer_resblocks_3_mlp_c_fc"] == ((component, f"{layer}.mlp.fc1"),)
    assert names[f"{component}.transformer.resblocks.3.ln_2"] == ((component, f"{layer}.layer_norm2"),)


def test_temporal_modules_of_svd_have_names_too():
    """The network is not implemented yet, but the module names in its adapters are known."""
    names = module_names({"unet": VIDEO}, video=True)
    block = "down_blocks.1.attentions.0.temporal_transformer_blocks.0"
    ours = "input_blocks.4.1.time_stack.0"

    exist = {
        ("unet", name.removesuffix(".weight"))
        for name in shapes("svd", "model.diffusion_model.")
        if name.endswith(".weight")
    }
    assert {module for modules in names.values() for module in modules} == exist
    for name in (f"unet.{block}.attn1.to_q", f"lora_unet_{block.replace('.', '_')}_attn1_to_q"):
        assert names[name] == (("unet", f"{ours}.attn1.to_q"),)
    assert names["unet.down_blocks.0.resnets.0.temporal_res_block.conv1"] == (
        ("unet", "input_blocks.1.0.time_stack.in_layers.2"),
    )  # fmt: skip
    assert names[f"diffusion_model.{ours}.ff_in.net.2"] == (("unet", f"{ours}.ff_in.net.2"),)
