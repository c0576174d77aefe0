"""Maps the tensor names of CLIP's image encoder in several layouts to those of Transformers, which `ClipVision` uses.

OpenCLIP's layout is like that of its text encoder: fused query, key and value, and a transposed projection.
"""

from __future__ import annotations

from collections.abc import Iterable

from gouache.layouts.rules import Drop, Rename, Rule, Transpose
from gouache.layouts.text import openclip_blocks

OPENCLIP_VISION: tuple[Rule, ...] = (
    Rename("class_embedding", "vision_model.embeddings.class_embedding"),
    Rename("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rename("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rename("ln_pre.{leaf}", "vision_model.pre_layrnorm.{leaf}"),
    *openclip_blocks("vision_model"),
    Rename("ln_post.{leaf}", "vision_model.post_layernorm.{leaf}"),
    Transpose("proj", "visual_projection.weight"),
)

TRANSFORMERS_VISION: tuple[Rule, ...] = (
    Drop("vision_model.embeddings.position_ids", "the numbers 0 to 256, which nothing needs"),
    Rename("vision_model.{rest*}", "vision_model.{rest*}"),
    Rename("visual_projection.weight", "visual_projection.weight"),
)


def vision_layout(names: Iterable[str]) -> tuple[str, tuple[Rule, ...]] | None:
    """The name of the layout and its table, decided by the first name that occurs in only one layout; else None."""
    for name in names:
        if name.startswith(("transformer.resblocks.", "class_embedding", "ln_pre.")):
            return "openclip", OPENCLIP_VISION
        if name.startswith("vision_model."):
            return "transformers", TRANSFORMERS_VISION
    return None
