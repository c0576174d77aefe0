"""What to do with a file: paint or train, with which size, clip skip and VAE; and which of several for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gouache.families.found import Found
from gouache.files.record import ModelFile

_VAES = {
    "sd1": "any VAE of Stable Diffusion 1 or 2, such as vae-ft-mse-840000",
    "sd2": "any VAE of Stable Diffusion 1 or 2, such as vae-ft-mse-840000",
    "sdxl": "a VAE of SDXL, such as sdxl_vae or, for float16, sdxl-vae-fp16-fix",
    "sdxl-refiner": "a VAE of SDXL, such as sdxl_vae or, for float16, sdxl-vae-fp16-fix",
}


def advice(file: ModelFile, found: Found) -> list[str]:
    """Sentences on how to use this file."""
    kind, family = found.kind.value, found.family.value
    if kind in ("checkpoint", "diffusers folder"):
        return list(_for_model(file, found))
    if kind == "vae":
        return ["it fits SD1 and SD2 if made for them, SDXL if made for that: nothing in the file tells; try it with "
                "`gouache vae bake`"]  # fmt: skip
    if kind == "unknown":
        return []
    fits = f"models of {family.title}" if family is not None else "no family that could be told from its widths"
    return [f"it fits {fits}"]


def _for_model(file: ModelFile, found: Found) -> Iterator[str]:
    family = found.family.value
    if family is None:
        return
    if found.size is not None:
        yield f"paint at {found.size.value[0]}x{found.size.value[1]} or near it"
    if found.missing:
        for name in found.missing:
            fit = f"; it takes {_VAES[family.name]}" if name == "vae" and family.name in _VAES else ""
            yield f"it cannot paint without its {name.replace('_', ' ')}{fit}"
    if family.name == "sd1":
        yield "clip skip 1, or 2 if it descends from NovelAI's model, as most anime models do"
    ema = found.ema.value if found.ema is not None else "none"
    if ema.startswith("both"):
        yield "to paint, its averages are better: `gouache prune` makes a file of them, smaller by a U-Net"
        yield "to fine-tune, keep it as it is: it holds the weights and their averages"
    elif ema == "counters":
        yield "it is made for painting: its weights are averages; to fine-tune, a file with both is better"
    if file.format.startswith(("torch", "pickle")):
        yield "as .safetensors it loads faster and anywhere: `gouache convert`"
    dtypes = {component.dtype.value for component in found.components.values()}
    if "F32" in dtypes and file.nbytes > 1e9:
        yield "in float16 it is half the size and paints the same but for rounding: `gouache prune --dtype fp16`"


def compare(found: Sequence[tuple[ModelFile, Found]]) -> list[str]:
    """Which of several models to paint with, and which to fine-tune from; nothing where the choice is not between
    forms of one family."""
    models = [(file, each) for file, each in found if each.kind.value in ("checkpoint", "diffusers folder")]
    families = {each.family.value for _, each in models}
    if len(models) < 2 or len(families) != 1 or None in families:
        return []
    whole = [(file, each) for file, each in models if not each.missing]
    if not whole:
        return ["none of them is whole"]
    paint = min(whole, key=lambda pair: (_rank_to_paint(pair[1]), pair[0].nbytes))
    train = min(whole, key=lambda pair: (_rank_to_train(pair[1]), -pair[0].nbytes))
    return [
        f"to paint: {paint[0].path.name} ({_why(paint[1])}; {paint[0].nbytes / 1e6:,.0f} MB)",
        f"to fine-tune: {train[0].path.name} ({_why(train[1])}; {train[0].nbytes / 1e6:,.0f} MB)",
    ]


def _rank_to_paint(found: Found) -> int:
    return {"counters": 0, "none": 1}.get(found.ema.value if found.ema is not None else "none", 2)


def _rank_to_train(found: Found) -> int:
    ema = found.ema.value if found.ema is not None else "none"
    return 0 if ema.startswith("both") else 1 if ema == "none" else 2


def _why(found: Found) -> str:
    ema = found.ema.value if found.ema is not None else "none"
    if ema.startswith("both"):
        return "weights and their averages"
    return "its weights are averages" if ema == "counters" else "weights without averages"
