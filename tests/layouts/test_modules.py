"""The names of modules in adapter files: every official one is found, and no name stands for two modules."""

from __future__ import annotations

import pytest

from gouache.families.sd import SD1, SD2
from gouache.families.sdxl import SDXL
from gouache.layouts.adapters import suffix_of
from gouache.layouts.modules import kohya_names, module_names, peft_names
from gouache.layouts.original import text_shapes, unet_shapes
from gouache.nn.spec import TextSpec, UNetSpec
from tests.layouts.manifests import shapes

LINES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def specs(line: str) -> dict[str, UNetSpec | TextSpec]:
    return {p.component: p.spec for p in LINES[line].places if isinstance(p.spec, UNetSpec | TextSpec)}


@pytest.mark.parametrize(
    ("manifest", "line"), [("lora_kohya_sd15", "sd1"), ("locon_kohya_sd15", "sd1"), ("lora_kohya_sdxl", "sdxl")]
)
def test_every_module_of_an_official_file_is_found_once(manifest: str, line: str):
    names = module_names(specs(line))
    stems = {name.removesuffix(suffix_of(name)) for name in shapes(manifest)}

    modules = [names[stem] for stem in stems]

    assert len(set(modules)) == len(stems)
    official = kohya_names(specs(line), line == "sdxl")
    assert {official[module] for module in modules} == stems


@pytest.mark.parametrize("line", LINES)
def test_every_alias_leads_to_a_module_that_exists(line: str):
    own = specs(line)
    exist = {
        (component, name.removesuffix(".weight"))
        for component, spec in own.items()
        for name in (unet_shapes(spec) if isinstance(spec, UNetSpec) else text_shapes(spec))
        if name.endswith(".weight")
    }
    names = module_names(own)

    assert set(names.values()) == exist
    for dialect in (peft_names(own), kohya_names(own, True), kohya_names(own, False)):
        assert dialect.keys() == exist and len(set(dialect.values())) == len(exist)
        assert all(names[name] == module for module, name in dialect.items())


def test_names_as_they_occur_in_files():
    names = module_names(specs("sd1"))
    query = ("unet", "input_blocks.1.1.transformer_blocks.0.attn1.to_q")

    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ):
        assert names[name] == query
    out = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    assert names[out] == ("unet", "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0")
