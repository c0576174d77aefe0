"""Names of a network's modules in adapter files: a table of every name in use; names are looked up, never split.

    lora_unet_down_blocks_0_attentions_0_proj_in     kohya, diffusers' blocks, dots as underscores (SD1, SD2)
    lora_unet_input_blocks_4_1_proj_in               kohya, the original blocks (SDXL)
    unet.down_blocks.0.attentions.0.proj_in          PEFT and diffusers
    diffusion_model.input_blocks.4.1.proj_in         ComfyUI, with text_encoders.clip_l.transformer.text_model...
    unet.input_blocks.4.1.proj_in                    OMI (OneTrainer), with clip_l.text_model...
    lora_te_text_model_encoder_layers_0_mlp_fc1      kohya's text encoders: te, or te1 and te2 where there are two
    lora_te_model_transformer_resblocks_0_attn_in_proj   OpenCLIP's names, with query, key and value fused

An underscore may be part of a name or replace a dot, so a name cannot be split. Instead the names of all modules are
generated, and those of a file are looked up among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gouache.layouts.diffusers import unet_rules
from gouache.layouts.diffusers_video import video_unet_rules
from gouache.layouts.original import text_shapes, unet_shapes
from gouache.layouts.original_video import video_unet_shapes
from gouache.layouts.rules import Shape, invert, plan
from gouache.nn.spec import TextSpec, UNetSpec

Module = tuple[str, str]
"""(component, path of the module in its network)."""

_TEXT = {
    "text_encoder": (
        "lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "lycoris_", "text_encoder.",
        "clip_l.", "clip_l.transformer.", "text_encoders.clip_l.", "text_encoders.clip_l.transformer.",
        "clip_h.", "clip_h.transformer.", "text_encoders.clip_h.", "text_encoders.clip_h.transformer.",
    ),
    "text_encoder_2": (
        "lora_te2_", "lycoris_te2_", "text_encoder_2.",
        "clip_g.", "clip_g.transformer.", "text_encoders.clip_g.", "text_encoders.clip_g.transformer.",
    ),
}  # fmt: skip
# Early names of diffusers for a text encoder's attention.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
# OpenCLIP's names in a layer -> ours; a fused name -> three.
_OPENCLIP = {
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
}


def module_names(specs: Mapping[str, UNetSpec | TextSpec], *, video: bool = False) -> dict[str, tuple[Module, ...]]:
    """Every module name that an adapter file may use -> the module, for a model of these components.

    A name with several modules is for the concatenation of their rows. `video`: the U-Net has temporal layers too.
    """
    names: dict[str, tuple[Module, ...]] = {}
    for component, spec in specs.items():
        if isinstance(spec, UNetSpec):
            found = {name: (module,) for name, module in _unet_names(spec, video).items()}
        else:
            found = _text_names(component, spec) | _openclip_names(component, spec)
        names |= {name: tuple((component, module) for module in modules) for name, modules in found.items()}
    return names


def _unet_names(spec: UNetSpec, video: bool) -> dict[str, str]:
    names: dict[str, str] = {}
    for module, other in diffusers_modules(spec, video).items():
        names[f"lora_unet_{_joined(other)}"] = names[f"lora_unet_{_joined(module)}"] = module
        names[f"oft_unet_{_joined(other)}"] = names[f"oft_unet_{_joined(module)}"] = module
        for prefix in ("lycoris_unet_", "lycoris_"):
            names[f"{prefix}{_joined(other)}"] = names[f"{prefix}{_joined(module)}"] = module
        names[f"unet.{other}"] = names[other] = names[f"diffusion_model.{module}"] = module
        names[f"unet.{module}"] = module  # OMI
        # diffusers' first adapters used attention processors: attn1.processor.to_q, and to_out without its number.
        attention, _, leaf = other.rpartition(".to_")
        if attention.endswith(("attn1", "attn2")):
            for old in (
                f"{attention}.processor.to_{leaf.removesuffix('.0')}",
                f"{attention}.to_{leaf.removesuffix('.0')}",
            ):
                names[f"unet.{old}"] = names[old] = module
    return names


def _text_names(component: str, spec: TextSpec) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for module in _modules(text_shapes(spec)):
        for prefix in _TEXT[component]:
            if prefix.endswith("_"):
                names[prefix + _joined(module)] = (module,)
            else:
                # Transformers 5 omits the outermost name.
                names[prefix + module] = names[prefix + module.removeprefix("text_model.")] = (module,)
                attention, _, leaf = module.rpartition(".")
                if old := _OLD_TEXT.get(leaf) if attention.endswith("self_attn") else None:
                    names[f"{prefix}{attention}.{old}"] = (module,)
                    names[f"{prefix}{module}.{old}"] = (module,)  # a LoRA of four in each layer, one of them used
        if component == "text_encoder":
            names[module] = (module,)
    return names


def _openclip_names(component: str, spec: TextSpec) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    for layer in range(spec.layers):
        for theirs, ours in _OPENCLIP.items():
            path = f"transformer.resblocks.{layer}.{theirs}"
            modules = tuple(f"text_model.encoder.layers.{layer}.{each}" for each in ours)
            for prefix in _TEXT[component]:
                if prefix.endswith("_"):
                    names[prefix + _joined(path)] = names[f"{prefix}model_{_joined(path)}"] = modules
                else:
                    names[prefix + path] = modules
    return names


def kohya_names(specs: Mapping[str, UNetSpec | TextSpec], original_blocks: bool) -> dict[Module, str]:
    """The name of each module in kohya's files. `original_blocks`: number U-Net blocks as the original, as for SDXL."""
    two = "text_encoder_2" in specs
    texts = {"text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_"}
    names: dict[Module, str] = {}
    for component, spec in specs.items():
        if isinstance(spec, UNetSpec):
            for path, other in diffusers_modules(spec).items():
                names[component, path] = "lora_unet_" + _joined(path if original_blocks else other)
        else:
            names |= {(component, path): texts[component] + _joined(path) for path in _modules(text_shapes(spec))}
    return names


def peft_names(specs: Mapping[str, UNetSpec | TextSpec]) -> dict[Module, str]:
    """The name of each module in PEFT's and diffusers' files."""
    names: dict[Module, str] = {}
    for component, spec in specs.items():
        paths = diffusers_modules(spec) if isinstance(spec, UNetSpec) else {p: p for p in _modules(text_shapes(spec))}
        names |= {(component, path): f"{component}.{other}" for path, other in paths.items()}
    return names


def diffusers_modules(spec: UNetSpec, video: bool = False) -> dict[str, str]:
    """{module of the U-Net: its name in diffusers}."""
    shapes = (video_unet_shapes if video else unet_shapes)(spec)
    attends = [bool(depth) for depth in spec.attention_depth]
    origins = plan(invert((video_unet_rules if video else unet_rules)(attends, spec.res_blocks)), shapes).origins
    return {
        origin.sources[0].removesuffix(".weight"): name.removesuffix(".weight")
        for name, origin in origins.items()
        if name.endswith(".weight")
    }


def _modules(shapes: Iterable[str] | Mapping[str, Shape]) -> list[str]:
    return [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]


def _joined(path: str) -> str:
    return path.replace(".", "_")
