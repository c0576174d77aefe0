"""Tensor names of adapter files: they show the format, the network, and the context width.

A name is `<prefix><module path><suffix>`. The suffix shows the format, the prefix the network, and the path which of
the two namings of U-Net modules is used. In kohya's files underscores also replace the dots of the path, so a path is
never split at underscores: it is looked up among the names of known modules when the adapter is attached.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gouache.layouts.rules import Shape

SUFFIXES: dict[str, str] = {
    # kohya and LyCORIS. The delta of a LoRA is up @ down * alpha / rank.
    ".lora_down.weight": "lora",
    ".lora_up.weight": "lora",
    ".lora_mid.weight": "locon",  # Tucker form of a convolution: a core between down and up
    # PEFT and current diffusers; then older names of diffusers
    ".lora_A.weight": "lora",
    ".lora_B.weight": "lora",
    ".lora_B.bias": "lora",  # with PEFT's lora_bias: added to the output, scaled like the factors' product
    ".lora_up.bias": "lora",
    ".lora.up.bias": "lora",
    ".lora.down.weight": "lora",
    ".lora.up.weight": "lora",
    "_lora.down.weight": "lora",  # attention processors: `...attn1.processor.to_q_lora.down.weight`
    "_lora.up.weight": "lora",
    ".lora_linear_layer.down.weight": "lora",
    ".lora_linear_layer.up.weight": "lora",
    # LoHa: the elementwise product of two low-rank pairs, each with a core `t` for convolutions
    ".hada_w1_a": "loha",
    ".hada_w1_b": "loha",
    ".hada_w2_a": "loha",
    ".hada_w2_b": "loha",
    ".hada_t1": "loha",
    ".hada_t2": "loha",
    # LoKr: a Kronecker product of two factors, each a full matrix or a low-rank pair
    ".lokr_w1": "lokr",
    ".lokr_w1_a": "lokr",
    ".lokr_w1_b": "lokr",
    ".lokr_w2": "lokr",
    ".lokr_w2_a": "lokr",
    ".lokr_w2_b": "lokr",
    ".lokr_t1": "lokr",
    ".lokr_t2": "lokr",
    # DoRA: in addition to any of the above, the norm of each column of the merged weight
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    # OFT, and with one more dimension BOFT; then PEFT's names
    ".oft_blocks": "oft",
    ".oft_diag": "oft",
    ".rescale": "oft",
    ".oft_R.weight": "oft",
    ".boft_R": "boft",
    ".boft_s": "boft",
    # IA3: `on_input` accompanies a plain `.weight`
    ".on_input": "ia3",
    ".ia3_l": "ia3",
    # less common formats
    ".a1.weight": "glora",
    ".a2.weight": "glora",
    ".b1.weight": "glora",
    ".b2.weight": "glora",
    ".bm.weight": "glora",
    ".diff": "full difference",
    ".diff_b": "full difference",
    ".set_weight": "full difference",  # ComfyUI: the new weight itself
    ".w_norm": "full difference",
    ".b_norm": "full difference",
    ".bias_indices": "sparse difference",  # early LyCORIS extractions: the largest values that the factors do not cover
    ".bias_values": "sparse difference",
    ".bias_size": "sparse difference",
    ".alpha": "",
    ".scale": "",
    ".scalar": "",
}
"""Suffix -> the format it belongs to; "" for scales, which occur in several formats."""

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
    "lycoris_": "unet",  # LyCORIS' wrapper around an arbitrary network
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_model.": "text_encoder",
    "diffusion_model.": "unet",  # ComfyUI
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
    "text_encoders.clip_h.": "text_encoder",
    "clip_l.": "text_encoder",  # OMI, the names of OneTrainer; its U-Net has the original's names under `unet.`
    "clip_g.": "text_encoder_2",
    "clip_h.": "text_encoder",
    "down_blocks.": "unet",  # diffusers' first adapters, which were for the U-Net only
    "mid_block.": "unet",
    "up_blocks.": "unet",
}
"""Prefix -> the component that the adapted module belongs to."""

# Strongest evidence first: a LoRA file may also contain full differences for some modules.
FORMATS = (
    "loha", "lokr", "locon", "lora", "boft", "oft", "glora", "ia3", "full difference", "sparse difference", "dora"
)  # fmt: skip
_ORDER = FORMATS[:-1]
_LONGEST_FIRST = tuple(sorted(SUFFIXES, key=len, reverse=True))
_ORIGINAL_BLOCKS = re.compile(r"(?:lora|oft)_unet_(?:input_blocks|middle_block|output_blocks)_")
_READS_INPUT = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".hada_w1_b", ".diff")
_CONTEXT_KEY = re.compile(r"attn2[._](?:processor[._])?to_k(?=[._])")


def suffix_of(name: str) -> str:
    """The suffix of a tensor name of an adapter, which shows its role in the module's change; "" if there is none."""
    return next((suffix for suffix in _LONGEST_FIRST if name.endswith(suffix)), "")


def split_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{tensor: (name of its module in the file, suffix)} for all `names` that have the form of an adapter's."""
    names = list(names)
    ia3 = {name.removesuffix(".on_input") for name in names if name.endswith(".on_input")}
    found: dict[str, tuple[str, str]] = {}
    doubled = next((prefix for prefix in _DOUBLED if any(name.startswith(prefix) for name in names)), "")
    for name in names:
        suffix = suffix_of(name)
        if not suffix and name.endswith(".weight") and name.removesuffix(".weight") in ia3:
            suffix = ".weight"
        stem = name.removesuffix(suffix)
        named = not suffix and _PEFT_PART.search(name) is not None
        if named and (match := _WITH_ADAPTER_NAME.fullmatch(name)) is not None:
            stem, suffix = match[1], f".{match[2]}.{match[3]}"
        elif named and (match := _WITH_ADAPTER_NAME_LAST.fullmatch(name)) is not None:
            stem, suffix = match[1], f".{match[2]}"
        if suffix:
            # PEFT puts base_model.model before the module names of the wrapped model, which may be one component.
            stem = stem.replace("base_model.model.", "")
            found[name] = stem[len(doubled) // 2 :] if doubled and stem.startswith(doubled) else stem, suffix
    return found


# PEFT's names with the name of the adapter in them, which PEFT usually removes: ...to_q.lora_A.default.weight. The
# adapter's name may be any text.
_PEFT_PART = re.compile(r"\.(?:lora_|hada_|lokr_|ia3_|oft_|boft_)")  # first: it is quick, and most names have none
_WITH_ADAPTER_NAME = re.compile(r"(.+?)\.(lora_[AB]|lora_magnitude_vector|oft_R)\.(?:.+)\.(weight|bias)")
_WITH_ADAPTER_NAME_LAST = re.compile(
    r"(.+?)\.(lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|ia3_l|boft_[Rs])\.(?:.+)"
)
_DOUBLED = ("unet.unet.", "text_encoder.text_encoder.")  # one release of diffusers wrote the prefix twice

BUNDLE_PREFIX = "bundle_emb."
"""Prefix of embeddings bundled with a LoRA: bundle_emb.<placeholder>.<tensor name as in an embedding file>."""
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\..+|clip_[lg]|text_encoders_[01]|emb_params)")
_BUNDLED_OTHER = re.compile(r"bundle_emb\.(.+)\.([^.]+)")


def bundled_name(name: str) -> tuple[str, str] | None:
    """(placeholder, which may have dots; the tensor's name as in an embedding file) of a bundled embedding's tensor."""
    match = _BUNDLED.fullmatch(name) or _BUNDLED_OTHER.fullmatch(name)
    return None if match is None else (match[1], match[2])


def bundled(names: Iterable[str]) -> dict[str, list[str]]:
    """{placeholder: the tensor names of its embedding}."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(BUNDLE_PREFIX) and (parts := bundled_name(name)) is not None:
            found.setdefault(parts[0], []).append(name)
    return found


@dataclass(frozen=True)
class AdapterNames:
    """What the tensor names of an adapter file show.

    `kind` is the format, "dora" if there are DoRA scales; `base` is the format without them. `modules` is the number
    of changed modules per component. `context_dim` is the context width that the U-Net was trained for, None if no
    cross-attention is changed. `block_names` is the numbering of U-Net blocks: "diffusers" or "original".
    `embeddings` are the placeholders of bundled textual inversions; `unnamed` are the tensors without a known suffix.
    """

    kind: str
    base: str
    modules: Mapping[str, int]
    context_dim: int | None
    block_names: str | None
    embeddings: tuple[str, ...]
    unnamed: tuple[str, ...]


def read_adapter(shapes: Mapping[str, Shape]) -> AdapterNames | None:
    """The kind of adapter that these tensors form; None if most of them are not named like an adapter's."""
    formats: Counter[str] = Counter()
    modules: dict[str, set[str]] = {}
    split = split_names(shapes)
    packed = bundled(shapes)
    for name, (module, suffix) in split.items():
        shape = shapes[name]
        kind = SUFFIXES.get(suffix, "ia3")
        if kind == "lora" and shape[2:] not in ((), (1, 1)):
            kind = "locon"  # LyCORIS' name for a LoRA on convolutions with kernels larger than 1x1
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
        context_dim=next(
            _context_dims({module + suffix: shapes[name] for name, (module, suffix) in split.items()}), None
        ),
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
    """The input width of each cross-attention's `to_k`, from the factor that shows it.

    The names in `shapes` have no adapter name in them.
    """
    for name, shape in shapes.items():
        if len(shape) < 2 or not _CONTEXT_KEY.search(name):
            continue
        if name.endswith(_READS_INPUT):
            yield shape[1]
        elif name.endswith(".a2.weight"):
            yield max(shape[:2])  # the rank and the width, in either order
        elif name.endswith(".oft_R.weight"):
            yield shape[0] * round((1 + (1 + 8 * shape[1]) ** 0.5) / 2)  # number of blocks times the block width
        elif name.endswith(".boft_R") and len(shape) == 4:
            yield shape[1] * shape[2]
        elif name.endswith((".lokr_w1", ".lokr_w1_b")):
            stem = name[: name.rindex(".")]
            second = shapes.get(f"{stem}.lokr_w2", shapes.get(f"{stem}.lokr_w2_b", ()))
            if len(second) >= 2:
                yield shape[1] * second[1]  # widths multiply in a Kronecker product


SDXL_VECTORS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",  # diffusers' pivotal tuning
    "text_encoders_1": "text_encoder_2",
}


@dataclass(frozen=True)
class EmbeddingNames:
    """What a textual inversion file's names show: format, number of vectors, vector width per text encoder."""

    format: str
    vectors: int
    widths: Mapping[str, int]


def embedding_entries(names: Iterable[str]) -> list[str]:
    """The tensors of an embedding file that are vectors for one text encoder, one for each placeholder."""
    names = list(names)
    if params := [name for name in names if name.startswith("string_to_param.")]:
        return params
    marked = [name for name in names if name == "*" or (name.startswith("<") and name.endswith(">"))]
    return marked or names


def read_embedding(shapes: Mapping[str, Shape], extra: Mapping[str, Any]) -> EmbeddingNames | None:
    """The textual inversion in these tensors, in any of the common formats; None if they are not one."""
    wide = {name: (1, *shape) if len(shape) == 1 else shape for name, shape in shapes.items()}
    # A1111 and the first textual inversion: {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, ...}
    if param := next((shape for name, shape in wide.items() if name.startswith("string_to_param.")), None):
        form = "A1111" if "string_to_token" in extra else "textual inversion"
        return EmbeddingNames(form, param[0], {"text_encoder": param[-1]})
    # A counter may be stored as a tensor beside the vectors.
    wide = {name: shape for name, shape in wide.items() if shapes[name] not in ((), (1,))}
    if not wide or any(len(shape) != 2 for shape in wide.values()):
        return None
    if set(wide) <= set(SDXL_VECTORS):
        widths = {encoder: wide[name][1] for name, encoder in SDXL_VECTORS.items() if name in wide}
        return EmbeddingNames(" and ".join(sorted(wide)), next(iter(wide.values()))[0], widths)
    entries = embedding_entries(wide)
    if len(entries) != len(wide):
        return None
    shape = wide[name := entries[0]]
    if len(entries) > 1:
        marked = all(each.startswith("<") or each == "*" for each in entries)
        return EmbeddingNames("diffusers", shape[0], {"text_encoder": shape[1]}) if marked else None
    # diffusers saves one tensor under its placeholder, which may be any word. CLIP widths are multiples of 64.
    plain = "." not in name or (name.startswith("<") and name.endswith(">"))
    if name != "emb_params" and (not plain or shape[0] > 128 or shape[1] % 64):
        return None
    return EmbeddingNames(name if name == "emb_params" else "diffusers", shape[0], {"text_encoder": shape[1]})


_HYPERNETWORK = re.compile(r"(\d{1,6})\.([01])\.linear\d?\.")


def read_hypernetwork(shapes: Mapping[str, Shape]) -> tuple[int, ...] | None:
    """The context widths that a hypernetwork (A1111's `.pt`) applies to; None if these tensors are not one.

    Its keys are the widths; each has a pair of networks, for keys and values: `768.0.linear.0.weight`.
    """
    widths = {int(match[1]) for name in shapes if (match := _HYPERNETWORK.match(name)) is not None}
    return tuple(sorted(widths)) if widths and all(map(_HYPERNETWORK.match, shapes)) else None
