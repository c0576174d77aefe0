"""Write LoRA files under kohya's or PEFT's names, with the metadata that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.layouts.modules import Module, kohya_names, peft_names
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.workshop import save
from gouache.workshop.modelspec import ARCHITECTURES

Specs = Mapping[str, UNetSpec | TextSpec]
Factors = tuple[Tensor, Tensor]
"""(up (out, r), down (r, in, ...)); their product is the difference."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMINGS = ("kohya", "peft")

# The keys of `Made.left_out`.
CONVOLUTIONS = "convolutions with conv_rank 0"
UNPAIRED = "not in the base model in the same shape"
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Made:
    """A LoRA that was written: its number of modules, smallest and largest rank, the share `held` of the squared
    difference, and the number of weights `left_out` by reason."""

    modules: int
    ranks: tuple[int, int]
    held: float
    nbytes: int
    left_out: Mapping[str, int]


def specs_of(found: Found) -> dict[str, UNetSpec | TextSpec]:
    return {name: part.spec for name, part in found.components.items() if isinstance(part.spec, UNetSpec | TextSpec)}


def check_target(target: Path, dtype: str, naming: str, overwrite: bool) -> None:
    if target.suffix.lower() != ".safetensors":
        raise RequestError(
            "out", f"{save.shown(target)} does not end in .safetensors, the only format LoRAs are written in"
        )
    if dtype not in DTYPES:
        raise RequestError("dtype", f"{printable(dtype, 40)!r} is not known; use {', '.join(DTYPES)}")
    if naming not in NAMINGS:
        raise RequestError("naming", f"{printable(naming, 40)!r} is not known; use {' or '.join(NAMINGS)}")
    save.check_target(target, overwrite)


def write(
    parts: Mapping[Module, Factors],
    specs: Specs,
    found: Found,
    target: Path,
    dtype: str,
    naming: str,
    metadata: Mapping[str, str],
    held: float,
    left_out: Mapping[str, int],
    *,
    overwrite: bool = False,
) -> Made:
    """Write `parts` as `target` under the names of `naming`, with `metadata` added to the model's description."""
    family = found.family.value
    original = family is not None and family.name.startswith("sdxl")

    names = kohya_names(specs, original) if naming == "kohya" else peft_names(specs)
    description = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": target.stem}
    if family is not None and family.name in ARCHITECTURES:
        description["modelspec.architecture"] = f"{ARCHITECTURES[family.name]}/lora"
    named = {names[module]: pair for module, pair in parts.items()}
    return write_stems(named, {**description, **metadata}, target, dtype, None, held, left_out, overwrite=overwrite)


def write_stems(
    parts: Mapping[str, Factors],
    metadata: Mapping[str, str],
    target: Path,
    dtype: str,
    comment: str | None,
    held: float,
    left_out: Mapping[str, int] | None = None,
    *,
    overwrite: bool = False,
) -> Made:
    """Write `parts`, {module name: (up, down)}. Names that contain dots are PEFT's and get PEFT's suffixes."""
    if not parts:
        raise ModelError(f"{save.shown(target)} would have no module: every difference is zero or was skipped")
    torch_dtype = DTYPES[dtype]
    tensors: dict[str, Tensor] = {}
    ranks = []
    for stem, (up, down) in parts.items():
        rank = down.shape[0]
        up = up.reshape(up.shape[0], rank, *[1] * (down.ndim - 2))
        up, down = up.to(torch_dtype), down.to(torch_dtype)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise ModelError(f"{printable(stem)} has values too large for {dtype}; use bf16 or fp32")
        if "." in stem:
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        else:
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=torch_dtype)
        ranks.append(rank)
    # Rank and alpha of the source file do not apply to the new one.
    stale = ("ss_network_dim", "ss_network_alpha")
    kept = {key: value for key, value in metadata.items() if not key.startswith(stale)}
    if not any("." in stem for stem in parts):
        kept |= {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)),
                 "ss_network_alpha": str(float(max(ranks)))}  # fmt: skip
    if comment is not None:
        kept["ss_training_comment"] = comment
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save.write_tensors(target, contiguous, kept, overwrite=overwrite)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Made(len(parts), (min(ranks), max(ranks)), held, nbytes, dict(left_out or {}))
