"""Maps the tensor names of text encoders in several layouts to those of Transformers, which `ClipText` uses.

OpenCLIP (SD2, SDXL's second encoder) fuses query, key and value into one tensor and stores the projection as a
parameter P that is applied as `x @ P`; it is the transpose of a linear layer's weight.
"""

from __future__ import annotations

from collections.abc import Iterable

from gouache.layouts.rules import Drop, Rename, Rule, Split, Transpose

_POSITION_IDS = "the numbers 0 to 76, which merging tools damage and nothing needs"
_TEMPERATURE = "the temperature of CLIP's contrastive loss, which generation does not use"
_IMAGE_TOWER = "CLIP's image encoder, which encoding prompts does not use"


def openclip_blocks(model: str) -> tuple[Rule, ...]:
    """Rules that map the blocks of an OpenCLIP text or image encoder to the layers of Transformers' `model`."""
    block, layer = "transformer.resblocks.{i}", f"{model}.encoder.layers.{{i}}"
    split = (
        Split(
            f"{block}.attn.in_proj_{leaf}", tuple(f"{layer}.self_attn.{part}_proj.{leaf}" for part in ("q", "k", "v"))
        )
        for leaf in ("weight", "bias")
    )
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    renamed = (Rename(f"{block}.{ours}.{{leaf}}", f"{layer}.{theirs}.{{leaf}}") for ours, theirs in names.items())
    return (*split, *renamed)


OPENCLIP: tuple[Rule, ...] = (
    Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *openclip_blocks("text_model"),
    Rename("ln_final.{leaf}", "text_model.final_layer_norm.{leaf}"),
    Transpose("text_projection", "text_projection.weight"),
    Drop("logit_scale", _TEMPERATURE),
    # Merges of files in two layouts carry it along.
    Drop("transformer.text_model.embeddings.position_ids", _POSITION_IDS),
    Drop("position_ids", _POSITION_IDS),
    Drop("attn_mask", "the causal mask, which is computed when needed"),
    Drop("visual.{rest*}", _IMAGE_TOWER),
)

TRANSFORMERS: tuple[Rule, ...] = (
    Drop("text_model.embeddings.position_ids", _POSITION_IDS),
    Drop("position_ids", _POSITION_IDS),
    Drop("embeddings.position_ids", _POSITION_IDS),
    Rename("text_model.{rest*}", "text_model.{rest*}"),
    Rename("text_projection.weight", "text_projection.weight"),
    Drop("logit_scale", _TEMPERATURE),
    Drop("vision_model.{rest*}", _IMAGE_TOWER),
    Drop("visual_projection.{rest*}", _IMAGE_TOWER),
)

BARE: tuple[Rule, ...] = (
    Drop("embeddings.position_ids", _POSITION_IDS),
    *(Rename(f"{part}.{{rest*}}", f"text_model.{part}.{{rest*}}") for part in ("embeddings", "encoder")),
    Rename("final_layer_norm.{leaf}", "text_model.final_layer_norm.{leaf}"),
    Rename("text_projection.weight", "text_projection.weight"),
)
"""Transformers' names without `text_model.`, as in the earliest SD1 files and in folders saved by transformers 5."""


def text_layout(names: Iterable[str]) -> tuple[str, tuple[Rule, ...]] | None:
    """The name of the layout and its table, decided by the first name that occurs in only one layout; else None."""
    for name in names:
        if name.startswith(("transformer.resblocks.", "token_embedding.", "ln_final.", "positional_embedding")):
            return "openclip", OPENCLIP
        if name.startswith("text_model."):
            return "transformers", TRANSFORMERS
        if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
            return "transformers without text_model", BARE
    return None
