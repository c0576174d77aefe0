"""How adapter files name their tensors: enough to say what a file is, for which network, and how wide.

A name is `<prefix><module path><suffix>`. The suffix tells the format, the prefix the network, the path which of two
namings of U-Net modules is meant. In kohya's files underscores also join the path, so a path is never taken apart at
them: it is looked up among the names of known modules, when the adapter is attached.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gouache.layouts.rules import Shape

SUFFIXES: dict[str, str] = {
    # kohya and LyCORIS. The delta of LoRA is up @ down, times alpha / rank.
    ".lora_down.weight": "lora",
    ".lora_up.weight": "lora",
    ".lora_mid.weight": "locon",  # Tucker form of a convolution: a core between down and up
    # PEFT and current diffusers; then its older spellings
    ".lora_A.weight": "lora",
    ".lora_B.weight": "lora",
    ".lora.down.weight": "lora",
    ".lora.up.weight": "lora",
    "_lora.down.weight": "lora",  # attention processors: `...attn1.processor.to_q_lora.down.weight`
    "_lora.up.weight": "lora",
    ".lora_linear_layer.down.weight": "lora",
    ".lora_linear_layer.up.weight": "lora",
    # LoHa: the elementwise product of two such pairs, each with a core `t` for convolutions
    ".hada_w1_a": "loha",
    ".hada_w1_b": "loha",
    ".hada_w2_a": "loha",
    ".hada_w2_b": "loha",
    ".hada_t1": "loha",
    ".hada_t2": "loha",
    # LoKr: a Kronecker product, either factor whole or itself a pair
    ".lokr_w1": "lokr",
    ".lokr_w1_a": "lokr",
    ".lokr_w1_b": "lokr",
    ".lokr_w2": "lokr",
    ".lokr_w2_a": "lokr",
    ".lokr_w2_b": "lokr",
    ".lokr_t1": "lokr",
    ".lokr_t2": "lokr",
    # DoRA: beside any of the above, the length of each column of the merged weight
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    # OFT, and with one dimension more BOFT; then PEFT's spellings
    ".oft_blocks": "oft",
    ".oft_diag": "oft",
    ".rescale": "oft",
    ".oft_R.weight": "oft",
    ".boft_R": "boft",
    ".boft_s": "boft",
    # IA3: `on_input` stands beside a plain `.weight`
    ".on_input": "ia3",
    ".ia3_l": "ia3",
    # rarer forms
    ".a1.weight": "glora",
    ".a2.weight": "glora",
    ".b1.weight": "glora",
    ".b2.weight": "glora",
    ".bm.weight": "glora",
    ".diff": "full difference",
    ".diff_b": "full difference",
    ".w_norm": "full difference",
    ".b_norm": "full difference",
    ".bias_indices": "sparse difference",  # LyCORIS' first extractions: the largest values that the factors missed
    ".bias_values": "sparse difference",
    ".bias_size": "sparse difference",
    ".alpha": "",
    ".scale": "",
    ".scalar": "",
}
"""Suffix -> the format it belongs to; "" for what scales a module in whatever format."""

PREFIXES: dict[str, str] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "oft_unet_": "unet",
    "lycoris_unet_": "unet",
    "lycoris_te_": "text_encoder",
    "lycoris_te1_": "text_encoder",
    "lycoris_te2_": "text_encoder_2",
    "lycoris_": "unet",  # LyCORIS' own wrapper, around whatever it was given
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_model.": "text_encoder",
    "diffusion_model.": "unet",  # ComfyUI
    "down_blocks.": "unet",  # diffusers' first adapters, which were for the U-Net alone
    "mid_block.": "unet",
    "up_blocks.": "unet",
}
"""Prefix -> the component whose modules the rest names."""

# The weaker a format's claim, the later: a full difference may stand beside a LoRA that it completes.
FORMATS = (
    "loha", "lokr", "locon", "lora", "boft", "oft", "glora", "ia3", "full difference", "sparse difference", "dora"
)  # fmt: skip
_ORDER = FORMATS[:-1]
_LONGEST_FIRST = tuple(sorted(SUFFIXES, key=len, reverse=True))
_ORIGINAL_BLOCKS = re.compile(r"(?:lora|oft)_unet_(?:input_blocks|middle_block|output_blocks)_")
_READS_INPUT = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".hada_w1_b", ".diff")
_CONTEXT_KEY = re.compile(r"attn2[._](?:processor[._])?to_k(?=[._])")


def suffix_of(name: str) -> str:
    """What of an adapter's name says which part of its module's change it is; "" for no adapter's name."""
    return next((suffix for suffix in _LONGEST_FIRST if name.endswith(suffix)), "")


def split_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{tensor: (what the file calls its module, suffix)} of all that are named like an adapter's."""
    names = list(names)
    ia3 = {name.removesuffix(".on_input") for name in names if name.endswith(".on_input")}
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        suffix = suffix_of(name)
        if not suffix and name.endswith(".weight") and name.removesuffix(".weight") in ia3:
            suffix = ".weight"
        if not suffix and (named := _WITH_ADAPTER.fullmatch(name)) is not None:
            found[name] = named[1].replace("base_model.model.", ""), f".{named[2]}.weight"
        if suffix:
            # PEFT puts base_model.model before the names of what it was given: all of it, or a component.
            found[name] = name.removesuffix(suffix).replace("base_model.model.", ""), suffix
    return found


# PEFT's names before it takes the adapter's own out of them: ...to_q.lora_A.default.weight
_WITH_ADAPTER = re.compile(r"(.+)\.(lora_[AB])\.\w+\.weight")

BUNDLED = "bundle_emb."
"""Before the names of embeddings that a LoRA brings along: bundle_emb.<placeholder>.<as in a file of its own>."""


def bundled(names: Iterable[str]) -> dict[str, list[str]]:
    """{placeholder: the tensors of its embedding}."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(BUNDLED) and name.count(".") >= 2:
            found.setdefault(name.split(".")[1], []).append(name)
    return found


@dataclass(frozen=True)
class AdapterNames:
    """What the names of an adapter file say.

    `kind` is its format, "dora" where lengths stand beside it; `base` then is the format beneath. `modules` counts the
    changed modules of each component. `context_dim` is the width of the prompt the U-Net was trained for, None if no
    cross-attention is changed. `block_names` says whose numbers of U-Net blocks are used: "diffusers" or "original".
    `embeddings` are the placeholders of textual inversions packed along; `unnamed` is what no suffix names.
    """

    kind: str
    base: str
    modules: Mapping[str, int]
    context_dim: int | None
    block_names: str | None
    embeddings: tuple[str, ...]
    unnamed: tuple[str, ...]


def read_adapter(shapes: Mapping[str, Shape]) -> AdapterNames | None:
    """What kind of adapter these tensors are; None where hardly any of them is named like one."""
    formats: Counter[str] = Counter()
    modules: dict[str, set[str]] = {}
    split = split_names(shapes)
    packed = bundled(shapes)
    for name, (module, suffix) in split.items():
        shape = shapes[name]
        kind = SUFFIXES.get(suffix, "ia3")
        if kind == "lora" and shape[2:] not in ((), (1, 1)):
            kind = "locon"  # what its authors named a LoRA that reaches a convolution of more than one pixel
        if kind == "oft" and len(shape) == 4:
            kind = "boft"
        formats[kind] += 1
        modules.setdefault(_component(module), set()).add(module)
    inside = {name for names in packed.values() for name in names}
    unnamed = [name for name in shapes if name not in split and name not in inside]
    named = sum(count for kind, count in formats.items() if kind)
    base = next((kind for kind in _ORDER if formats[kind]), None)
    if base is None or named < len(unnamed):
        return None
    return AdapterNames(
        kind="dora" if formats["dora"] else base,
        base=base,
        modules={component: len(names) for component, names in sorted(modules.items())},
        context_dim=next(_context_dims(shapes), None),
        block_names=_block_names(shapes),
        embeddings=tuple(sorted(packed)),
        unnamed=tuple(unnamed),
    )


def _component(name: str) -> str:
    return next((component for prefix, component in PREFIXES.items() if name.startswith(prefix)), "unknown")


def _block_names(shapes: Mapping[str, Shape]) -> str | None:
    if any(_ORIGINAL_BLOCKS.match(name) for name in shapes):
        return "original"
    return "diffusers" if any(_component(name) == "unet" for name in shapes) else None


def _context_dims(shapes: Mapping[str, Shape]) -> Iterator[int]:
    """The input width of each cross-attention's `to_k`, from whichever of its factors tells it."""
    for name, shape in shapes.items():
        if len(shape) < 2 or not _CONTEXT_KEY.search(name):
            continue
        if name.endswith(_READS_INPUT):
            yield shape[1]
        elif name.endswith(".a2.weight"):
            yield max(shape[:2])  # of a rank and the width, whichever way round
        elif name.endswith(".oft_R.weight"):
            yield shape[0] * round((1 + (1 + 8 * shape[1]) ** 0.5) / 2)  # blocks by their width
        elif name.endswith(".boft_R") and len(shape) == 4:
            yield shape[1] * shape[2]
        elif name.endswith((".lokr_w1", ".lokr_w1_b")):
            stem = name[: name.rindex(".")]
            second = shapes.get(f"{stem}.lokr_w2", shapes.get(f"{stem}.lokr_w2_b", ()))
            if len(second) >= 2:
                yield shape[1] * second[1]  # of a Kronecker product, widths multiply


SDXL_VECTORS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",  # diffusers' pivotal tuning
    "text_encoders_1": "text_encoder_2",
}


@dataclass(frozen=True)
class EmbeddingNames:
    """What the names of a textual inversion file say: its format, how many vectors, how wide for each encoder."""

    format: str
    vectors: int
    widths: Mapping[str, int]


def read_embedding(shapes: Mapping[str, Shape], extra: Mapping[str, Any]) -> EmbeddingNames | None:
    """The textual inversion in these tensors, in any of the forms in use; None where they are not one."""
    wide = {name: (1, *shape) if len(shape) == 1 else shape for name, shape in shapes.items()}
    # A1111 and the first textual inversion: {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, ...}
    if param := next((shape for name, shape in wide.items() if name.startswith("string_to_param.")), None):
        form = "A1111" if "string_to_token" in extra else "textual inversion"
        return EmbeddingNames(form, param[0], {"text_encoder": param[-1]})
    if not wide or any(len(shape) != 2 for shape in wide.values()):
        return None
    if set(wide) <= set(SDXL_VECTORS):
        widths = {encoder: wide[name][1] for name, encoder in SDXL_VECTORS.items() if name in wide}
        return EmbeddingNames(" and ".join(sorted(wide)), next(iter(wide.values()))[0], widths)
    if len(wide) > 1:
        return None
    (name, shape) = next(iter(wide.items()))
    # diffusers saves one tensor under its placeholder, which may be any word. Every CLIP has 64 channels a head.
    if name != "emb_params" and ("." in name or shape[0] > 128 or shape[1] % 64):
        return None
    return EmbeddingNames(name if name == "emb_params" else "diffusers", shape[0], {"text_encoder": shape[1]})


_HYPERNETWORK = re.compile(r"(\d{1,6})\.([01])\.linear\d?\.")


def read_hypernetwork(shapes: Mapping[str, Shape]) -> tuple[int, ...] | None:
    """The context widths that a hypernetwork (A1111's `.pt`) acts on; None where these tensors are not one.

    Its records stand under whole numbers, each a pair of networks for keys and values: `768.0.linear.0.weight`.
    """
    widths = {int(match[1]) for name in shapes if (match := _HYPERNETWORK.match(name)) is not None}
    return tuple(sorted(widths)) if widths and all(map(_HYPERNETWORK.match, shapes)) else None
