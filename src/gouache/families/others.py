"""Recognises related files that are not Stable Diffusion models, each by a characteristic part of a tensor name."""

from __future__ import annotations

from collections.abc import Iterable

from gouache.errors import printable
from gouache.families.found import Fact
from gouache.layouts.tiny import tiny_names

# (kind, description, parts of tensor names: a file with any of them is of this kind)
_OTHERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "controlnet",
        "a ControlNet",
        ("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.", "input_hint_block.", "lllite_unet"),
    ),
    ("t2i-adapter", "a T2I-Adapter", ("adapter.body.", "body.0.in_conv.", "body.0.resnets.")),
    ("ip-adapter", "an IP-Adapter", ("ip_adapter.", "image_proj.")),
    ("motion module", "an AnimateDiff motion module", ("motion_modules.",)),
    ("upscaler", "an ESRGAN upscaler", ("RDB1.conv1.", "rdb1.conv1.", "RRDB_trunk.")),
    ("upscaler", "a SwinIR or HAT upscaler", ("residual_group.blocks.",)),
    ("upscaler", "the Stable Diffusion upscaler", ("label_emb.weight", "unet/class_embedding.weight")),
    (
        "unknown",
        "a LoRA of cloneofsimo's lora, which numbers its modules; convert it with that tool, or train it again",
        ("unet:0:up", "unet:0:down", "text_encoder:0:up", "text_encoder:0:down"),
    ),
    ("unknown", "Stable Diffusion 3", ("joint_blocks.",)),
    ("unknown", "Flux", ("double_blocks.", "single_transformer_blocks.")),
    ("unknown", "Stable Cascade", ("clip_txt_mapper.", "channelwise.")),
    ("unknown", "a diffusion transformer", ("adaLN_modulation", "adaln_single.", "cap_embedder.", "scale_shift_table")),
    ("unknown", "a T5 text encoder", ("SelfAttention.relative_attention_bias.",)),
)
_IMAGE_TOWER = ("vision_model.encoder.", "visual.transformer.resblocks.")


def other_kind(names: Iterable[str]) -> Fact[str] | None:
    """The kind of a file with these tensor `names`, with the name that shows it; None if no entry matches."""
    names = list(names)
    if (tiny := tiny_names(names)) is not None:
        towers = " and ".join(sorted({name.partition(".")[0] for name in tiny}))
        return Fact("preview decoder", f"its names are those of a TAESD autoencoder: {towers}", "certain")
    every = "\n".join(sorted(names))
    for kind, title, pieces in _OTHERS:
        for piece in pieces:
            if (at := every.find(piece)) >= 0:
                name = _line_at(every, at)
                what = f"resembles {title}" if kind == "unknown" else f"is {title}"
                return Fact(kind, f"the tensor name {printable(name)} shows that this {what}", "likely")
    return None


def image_encoder_kind(names: Iterable[str]) -> Fact[str] | None:
    """The kind of a file whose only known content is an image encoder, or the safety checker built on one."""
    every = list(names)
    if any("special_care_embeds" in name for name in every):
        return Fact("safety checker", "the tensor name special_care_embeds shows a safety checker", "certain")
    name = next((name for name in every if any(piece in name for piece in _IMAGE_TOWER)), None)
    return (
        Fact("image encoder", f"the tensor name {printable(name)} shows a CLIP image encoder", "likely")
        if name
        else None
    )


def _line_at(text: str, at: int) -> str:
    return text[text.rfind("\n", 0, at) + 1 :].partition("\n")[0]
