"""Advice on how to use a file: for painting or training, at which size, clip skip and VAE; and which of several files
to choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gouache.errors import printable
from gouache.families.found import Found
from gouache.files.record import ModelFile

_VAES = {
    "sd1": "any Stable Diffusion 1 or 2 VAE, such as vae-ft-mse-840000",
    "sd2": "any Stable Diffusion 1 or 2 VAE, such as vae-ft-mse-840000",
    "sdxl": "an SDXL VAE, such as sdxl_vae or, for float16, sdxl-vae-fp16-fix",
    "sdxl-refiner": "an SDXL VAE, such as sdxl_vae or, for float16, sdxl-vae-fp16-fix",
}


def advice(file: ModelFile, found: Found) -> list[str]:
    """Sentences on how to use this file."""
    kind, family = found.kind.value, found.family.value
    if kind in ("checkpoint", "diffusers folder"):
        return list(_for_model(file, found))
    if kind == "vae":
        return ["it was made either for SD1 and SD2 or for SDXL; nothing in the file says which; try it with "
                "`gouache vae bake`"]  # fmt: skip
    if kind == "unknown":
        return []
    if family is None:
        return ["its widths match no known model family, so which models it fits is unknown"]
    return [f"it fits {family.title} models"]


def _for_model(file: ModelFile, found: Found) -> Iterator[str]:
    family = found.family.value
    if family is None:
        return
    if found.size is not None:
        yield f"paint at about {found.size.value[0]}x{found.size.value[1]}"
    if found.missing:
        for name in found.missing:
            compatible = f"; use {_VAES[family.name]}" if name == "vae" and family.name in _VAES else ""
            yield f"it cannot paint because its {name.replace('_', ' ')} is missing{compatible}"
    if family.name == "sd1":
        # NovelAI's model and those based on it have the released widths; others were trained without clip skip.
        text = found.components.get("text_encoder")
        released = text is None or text.spec == family.spec("text_encoder")
        anime = ", or 2 if it is based on NovelAI's model, as most anime models are" if released else ""
        yield f"use clip skip 1{anime}"
    ema = found.ema.value if found.ema is not None else "none"
    if ema.startswith("both"):
        yield "for painting, its EMA weights are better: `gouache prune` writes a file of them, smaller by a U-Net"
        yield "for fine-tuning, keep the file as it is: it holds the trained and the EMA weights"
    elif ema in ("counters", "only"):
        yield "for painting, use it as it is: its weights are EMA weights; for fine-tuning, a file with both is better"
    if file.format.startswith(("torch", "pickle")):
        yield "as .safetensors it loads faster and in more programs: `gouache convert`"
    dtypes = {component.dtype.value for component in found.components.values()}
    if "F32" in dtypes and file.nbytes > 1e9:
        yield "in float16 it has half the size and paints the same except for rounding: `gouache prune --dtype fp16`"


def compare(found: Sequence[tuple[ModelFile, Found]]) -> list[str]:
    """Which of several models to paint with, and which to fine-tune from; [] unless at least two models of the same
    family are given."""
    models = [(file, each) for file, each in found if each.kind.value in ("checkpoint", "diffusers folder")]
    families = {each.family.value for _, each in models}
    if len(models) < 2 or len(families) != 1 or None in families:
        return []
    complete = [(file, each) for file, each in models if not each.missing]
    if not complete:
        return ["none is complete"]
    paint = min(complete, key=lambda pair: (_rank_for_painting(pair[1]), pair[0].nbytes))
    train = min(complete, key=lambda pair: (_rank_for_training(pair[1]), -pair[0].nbytes))
    return [f"best for painting: {_described(*paint)}", f"best for fine-tuning: {_described(*train)}"]


def _described(file: ModelFile, found: Found) -> str:
    return f"{printable(file.path.name)} ({_weights_held(found)}; {file.nbytes / 1e6:,.0f} MB)"


def _rank_for_painting(found: Found) -> int:
    return {"counters": 0, "only": 0, "none": 1}.get(found.ema.value if found.ema is not None else "none", 2)


def _rank_for_training(found: Found) -> int:
    ema = found.ema.value if found.ema is not None else "none"
    return 0 if ema.startswith("both") else 1 if ema == "none" else 2


def _weights_held(found: Found) -> str:
    ema = found.ema.value if found.ema is not None else "none"
    if ema.startswith("both"):
        return "trained and EMA weights"
    return "EMA weights" if ema in ("counters", "only") else "weights without EMA"
